"""Attempts as processes: start, watch, stop, and leave none behind.

The launcher's standard input is a pipe whose other end only the driver holds. When the driver dies, however it dies,
the launcher reads end-of-file and stops its stage.
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
"""How far two readings of one process's start time may lie apart (clock ticks, rounding)."""


class AttemptProcess:
    """A living or ended launcher; started by this driver, or left over from one that died."""

    def __init__(self, pid: int, created: float, stage_file: Path, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.created = created
        self._stage_file = stage_file
        self._child = child

    @property
    def is_ours(self) -> bool:
        """Whether this driver started it, and so knows its exit code."""
        return self._child is not None

    @property
    def is_alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return _is_alive(self.pid, self.created)

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal. None: it lives, or another driver started it."""
        return None if self._child is None else self._child.poll()

    def terminate(self) -> None:
        """Ask the launcher to stop its stage, which saves a checkpoint first."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the launcher and everything it started, at once."""
        self._signal(signal.SIGKILL)
        self.sweep()

    def sweep(self) -> None:
        """End what an ended launcher left behind.

        Workers may be in sessions of their own, so they are known by the environment they inherited.
        """
        end_all(self._stage_file)
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    stage_file: Path,
    log: Path,
    on_end: Callable[[], None] = lambda: None,
) -> AttemptProcess:
    """Start a launcher in a session of its own, so that the terminal's Ctrl-C reaches the driver only.

    `on_end` is called from another thread when it has ended.
    """
    with log.open("ab") as output:
        child = _spawn(command, {**os.environ, **environment, ENV_STAGE_FILE: str(stage_file)}, output)
    threading.Thread(target=_tell_end, args=(child, on_end), daemon=True).start()
    try:
        created = psutil.Process(child.pid).create_time()
    except psutil.Error:
        created = 0.0  # it has ended already
    return AttemptProcess(child.pid, created, stage_file, child)


def adopt(pid: int, created: float, stage_file: Path) -> AttemptProcess:
    """Return the launcher another driver started; it may have ended."""
    return AttemptProcess(pid, created, stage_file, None)


def _spawn(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _tell_end(child: subprocess.Popen[bytes], on_end: Callable[[], None]) -> None:
    child.wait()
    on_end()


def _is_alive(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < CREATED_TOLERANCE_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_all(stage_file: Path) -> None:
    """Kill every living process that was started to work on `stage_file`."""
    for process in _started_for(stage_file):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _started_for(stage_file: Path) -> list[psutil.Process]:
    """Return every living process that was started to work on `stage_file`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(ENV_STAGE_FILE) == str(stage_file):
                found.append(process)
    return found
