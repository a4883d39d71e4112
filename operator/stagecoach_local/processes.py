"""Processes of attempts: start, watch and stop them, and leave no orphans.

The launcher's standard input is a pipe whose write end only the driver holds. When the driver dies for any reason,
SIGKILL included, the launcher reads end-of-file and stops its stage.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from stagecoach_api.names import ENV_STAGE_FILE

CREATED_TOLERANCE_SECONDS = 2.0
"""Largest difference between two readings of the same process's start time (clock ticks, rounding)."""


class AttemptProcess:
    """A running or ended launcher, started by this driver or by an earlier one that died."""

    def __init__(self, pid: int, created: float, stage_file: Path, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.created = created
        self._stage_file = stage_file
        self._child = child

    @property
    def is_ours(self) -> bool:
        """Whether this driver started it and can read its exit code."""
        return self._child is not None

    @property
    def is_alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return is_running(self.pid, self.created)

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None if it is running or was started by another driver."""
        return None if self._child is None else self._child.poll()

    def terminate(self) -> None:
        """Send the launcher SIGTERM: the stage saves a checkpoint, then stops."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the launcher and every process it started."""
        self._signal(signal.SIGKILL)
        self.sweep()

    def sweep(self) -> None:
        """Kill the processes that an ended launcher left running.

        Workers may be in their own sessions, so they are identified by the environment they inherited.
        """
        kill_all(self._stage_file)
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            # It may end between the check and the signal; `_notify_end` then reaps it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    stage_file: Path,
    log: Path,
    on_end: Callable[[], None] = lambda: None,
    inherited: tuple[int, ...] = (),
) -> AttemptProcess:
    """Start a launcher in its own session, so that the terminal's Ctrl-C reaches only the driver.

    `on_end`: called from another thread when the launcher has ended. `inherited`: file descriptors that stay open in
    the launcher, for the locks on them; its workers do not get them.
    """
    with log.open("ab") as output:
        child = _spawn(command, {**os.environ, **environment, ENV_STAGE_FILE: str(stage_file)}, output, inherited)
    # A daemon thread, so that a launcher that does not end cannot keep the driver alive.
    threading.Thread(target=_notify_end, args=(child, on_end), daemon=True).start()
    try:
        created = psutil.Process(child.pid).create_time()
    except psutil.Error:
        created = 0.0  # it has already ended
    return AttemptProcess(child.pid, created, stage_file, child)


def adopt(pid: int, created: float, stage_file: Path) -> AttemptProcess:
    """Return a launcher that another driver started; it may have ended."""
    return AttemptProcess(pid, created, stage_file, None)


def _spawn(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes], inherited: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=inherited,
    )


def _notify_end(child: subprocess.Popen[bytes], on_end: Callable[[], None]) -> None:
    child.wait()
    on_end()


def is_running(pid: int, created: float) -> bool:
    """Whether the process with this id that started at `created` is running."""
    try:
        process = psutil.Process(pid)
        # Process ids are reused: only the start time shows that it is still the same process.
        same = abs(process.create_time() - created) < CREATED_TOLERANCE_SECONDS
        # Orphans of a dead driver stay zombies where process 1 does not reap them, as in many containers.
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill_all(stage_file: Path) -> None:
    """Kill every running process that was started for `stage_file`."""
    for process in _started_for(stage_file):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _started_for(stage_file: Path) -> list[psutil.Process]:
    """Return every running process that was started for `stage_file`."""
    found = []
    # Not by process group: workers may have sessions of their own. The environment of another user's process cannot be
    # read, and a process may end meanwhile: neither is ours.
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(ENV_STAGE_FILE) == str(stage_file):
                found.append(process)
    return found
