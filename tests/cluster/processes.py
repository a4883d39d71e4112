"""Background processes, each in its own session, found and stopped by the pid that was recorded at the start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.cluster.report import ClusterError, last_lines

START_TIME_TOLERANCE_SECONDS = 1.0
"""Allowed difference between a process's start time and the record: the kernel counts in ticks."""
DEFAULT_GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1
PLAIN_ENVIRONMENT = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Variables of the caller's environment that a process gets; others could change its behaviour."""


class Processes:
    """The processes of one cluster, recorded as `<name>.json` next to their logs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def names(self) -> list[str]:
        """Recorded processes, the last started first."""
        records = sorted(self._folder.glob("*.json"), key=lambda record: record.stat().st_mtime_ns, reverse=True)
        return [record.stem for record in records]

    def log(self, name: str) -> Path:
        """Return the path of a process's log."""
        return self._folder / f"{name}.log"

    def is_alive(self, name: str) -> bool:
        """Return whether the recorded process is still running."""
        return self._find(name) is not None

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> bool:
        """Start a process unless it is running; return whether it was started. Pass secrets in `environment` only."""
        if self.is_alive(name):
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        plain = {key: os.environ[key] for key in PLAIN_ENVIRONMENT if key in os.environ}
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [str(argument) for argument in command],
                env=plain | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started[name] = process
        record = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        self._record(name).write_text(json.dumps(record))
        return True

    def stop(self, name: str, grace_seconds: float = DEFAULT_GRACE_SECONDS) -> None:
        """Terminate a process and its group, kill them after the grace period, and remove the record, if any."""
        process = self._find(name)
        if process is not None:
            signal_group(process.pid, signal.SIGTERM)
            if not self._ended(name, grace_seconds):
                signal_group(process.pid, signal.SIGKILL)
                if not self._ended(name, DEFAULT_GRACE_SECONDS):
                    raise ClusterError(f"{name} (pid {process.pid}) did not end after SIGKILL: see `ps {process.pid}`")
        self._record(name).unlink(missing_ok=True)

    def wait_for(self, name: str, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready()`. Raises ClusterError with the end of the log if the process ends or on timeout."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.is_alive(name):
                raise ClusterError(f"{name} ended before it was ready; {last_lines(self.log(name))}")
            if time.monotonic() > deadline:
                raise ClusterError(f"{name} was not ready after {seconds:.0f} s; {last_lines(self.log(name))}")
            time.sleep(POLL_SECONDS)

    def _ended(self, name: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._find(name) is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _find(self, name: str) -> psutil.Process | None:
        """Return the recorded process, or None if it has ended, even if another process has its pid now."""
        if name in self._started:
            self._started[name].poll()  # else an ended child of this process would stay a zombie
        try:
            record = json.loads(self._record(name).read_text())
            process = psutil.Process(record["pid"])
            same = abs(process.create_time() - record["started"]) < START_TIME_TOLERANCE_SECONDS
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None

    def _record(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to the group of a process that leads its session, so that the group has its pid."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


Argument = str | Path
"""An argument of a command."""


def run(command: Sequence[Argument], *, given: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output. Raises ClusterError with its message if it fails."""
    arguments = [str(argument) for argument in command]
    variables = os.environ | dict(environment or {})
    done = subprocess.run(arguments, input=given, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = (done.stderr or done.stdout).strip()
        raise ClusterError(f"`{' '.join(arguments[:4])} …` failed with exit code {done.returncode}: {message}")
    return done.stdout


def succeeds(command: Sequence[Argument], *, given: str | None = None) -> bool:
    """Return whether a command ends with exit code 0; its output is discarded."""
    arguments = [str(argument) for argument in command]
    return subprocess.run(arguments, input=given, text=True, capture_output=True, check=False).returncode == 0


def wait_until(what: str, ready: Callable[[], bool], seconds: float) -> None:
    """Wait until `ready()`. Raises ClusterError naming `what` on timeout."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise ClusterError(f"timeout after {seconds:.0f} s, waiting until {what}")
        time.sleep(POLL_SECONDS)


def responds(url: str) -> bool:
    """Return whether an HTTP server responds at a URL, be it with an error."""
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - an address of ours
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
