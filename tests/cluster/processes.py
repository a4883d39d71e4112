"""Processes in sessions of their own: started, found again and stopped by the pid written down at the start."""

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
"""How far a process's start time may differ from the record: the kernel counts in ticks."""
DEFAULT_GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1
PLAIN_ENVIRONMENT = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""What a process gets of the caller's environment: enough to run, and nothing that would change how."""


class Processes:
    """The processes of one cluster, recorded as `<name>.json` beside their logs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def names(self) -> list[str]:
        """Recorded processes, the last started first."""
        records = sorted(self._folder.glob("*.json"), key=lambda record: record.stat().st_mtime_ns, reverse=True)
        return [record.stem for record in records]

    def log(self, name: str) -> Path:
        """Return the file that holds what a process said."""
        return self._folder / f"{name}.log"

    def is_alive(self, name: str) -> bool:
        """Say whether the process that was written down still runs."""
        return self._find(name) is not None

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> bool:
        """Start a process unless it runs; say whether it was started. Secrets go through `environment`, if at all."""
        if self.is_alive(name):
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        plain = {key: os.environ[key] for key in PLAIN_ENVIRONMENT if key in os.environ}
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
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
        """End a process and its group: asked first, killed after the grace; forget it. No error if it is gone."""
        process = self._find(name)
        if process is not None:
            signal_group(process.pid, signal.SIGTERM)
            if not self._ended(name, grace_seconds):
                signal_group(process.pid, signal.SIGKILL)
                if not self._ended(name, DEFAULT_GRACE_SECONDS):
                    raise ClusterError(f"{name} (pid {process.pid}) does not end, even killed: see `ps {process.pid}`")
        self._record(name).unlink(missing_ok=True)

    def wait_for(self, name: str, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready()`. Raises ClusterError, with the log's end, when the process ends or time is over."""
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
        """Return the recorded process, or None when it ended; another one that got its pid does not count."""
        if name in self._started:
            self._started[name].poll()  # a child of this very process would stay a zombie
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
    """Send a signal to a process's group, which has its pid since it leads its session."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


Word = str | Path
"""One word of a command."""


def run(command: Sequence[Word], *, given: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and return what it printed. Raises ClusterError with its message when it fails."""
    words = [str(word) for word in command]
    variables = os.environ | dict(environment or {})
    done = subprocess.run(words, input=given, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = (done.stderr or done.stdout).strip()
        raise ClusterError(f"`{' '.join(words[:4])} …` failed with exit code {done.returncode}: {message}")
    return done.stdout


def succeeds(command: Sequence[Word], *, given: str | None = None) -> bool:
    """Say whether a command ends with exit code 0. Only for questions: what it says is lost."""
    words = [str(word) for word in command]
    return subprocess.run(words, input=given, text=True, capture_output=True, check=False).returncode == 0


def wait_until(what: str, ready: Callable[[], bool], seconds: float) -> None:
    """Wait until `ready()`. Raises ClusterError naming `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(POLL_SECONDS)


def answers(url: str) -> bool:
    """Say whether anything speaks HTTP at a URL; a refusal is an answer."""
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - an address of ours
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
