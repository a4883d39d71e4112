"""What the ranks of an attempt that is stopped were doing, for its logs: nothing else explains a hang.

    SIGUSR1 ─► faulthandler in the rank   Python frames of all threads, also while one holds the GIL in native code
    py-spy, where it is allowed           the same from outside, for a rank that handles no signal
    NCCL's flight recorder                the last collectives of each rank, when one of them exceeds its time limit

The launcher does not learn why it is to stop. A rank that hangs is known by the progress that had ended long before,
or because it does not react: a healthy one stops after its current step.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from stagecoach_api.names import ENV_PROGRESS_FILE
from stagecoach_trainer.runtime.attempt_files import logs_folder

SILENT_SECONDS = 300.0
"""Without progress for this long, an attempt that is stopped is taken for one that hangs."""
LATE_SECONDS = 30.0
"""Ranks that have not ended this long after the request to stop may hang; at most half of the grace period."""
TOTAL_SECONDS = 10.0
"""Upper limit of the delay of a stop by the dumps."""
FLIGHT_RECORDER = "nccl-flight-recorder.rank-"
"""Beginning of the names of NCCL's dumps, which the rank follows. They lie in the folder of the logs and are uploaded
with them; `torchfrtrace` of PyTorch reads them. Nothing here does: they are pickles."""


def flight_recorder_environment(environment: Mapping[str, str], work: Path) -> dict[str, str]:
    """Return the variables that let NCCL record collectives and dump them on a time-out; those that are set stay."""
    defaults = {
        "TORCH_FR_BUFFER_SIZE": "2000",  # the number that PyTorch's tutorial on it recommends
        "TORCH_FR_DUMP_TEMP_FILE": str(logs_folder(work) / FLIGHT_RECORDER),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    return {name: value for name, value in defaults.items() if name not in environment}


class StackDumps:
    """Writes the stacks of a node's ranks once, before or after they are asked to stop."""

    def __init__(
        self,
        environment: Mapping[str, str],
        grace_seconds: float,
        note: Callable[[int, str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`note`: adds text to the log of a rank."""
        progress = environment.get(ENV_PROGRESS_FILE)
        self._progress = Path(progress) if progress else None
        self._late_seconds = min(LATE_SECONDS, grace_seconds / 2)
        self._note = note
        self._clock = clock
        self._stop_at: float | None = None
        self._dumped = False

    def look(self, pids: Mapping[int, int]) -> None:
        """Dump the stacks if the attempt seems to hang. To be called before a request to stop is forwarded, and then
        until the ranks have ended. `pids`: process ids by rank."""
        now = self._clock()
        if self._stop_at is None:
            self._stop_at = now
            silent = self._silence(now)
            if silent is not None and silent >= SILENT_SECONDS:
                self._dump(pids, f"no progress for {silent:.0f} s")
        elif now - self._stop_at >= self._late_seconds:
            self._dump(pids, f"still running {now - self._stop_at:.0f} s after the request to stop")

    def _silence(self, now: float) -> float | None:
        """Return the time since the last progress. None on nodes without rank 0, which alone writes it."""
        if self._progress is None:
            return None
        with contextlib.suppress(OSError):
            return now - self._progress.stat().st_mtime
        return None

    def _dump(self, pids: Mapping[int, int], why: str) -> None:
        if self._dumped or not pids:
            return
        self._dumped = True
        deadline = time.monotonic() + TOTAL_SECONDS
        for rank, pid in pids.items():
            self._note(rank, f"{why}; the stacks of rank {rank} follow")
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGUSR1)
        for rank, pid in pids.items():
            text = spied(pid, deadline - time.monotonic())
            if text:
                self._note(rank, text)


def spied(pid: int, seconds: float) -> str:
    """Return the stacks of a process as py-spy reads them; empty if it is not installed or there is no time left."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None or seconds <= 0:
        return ""
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}"
    # Reading another process needs a right that a cluster may not give; the reason is worth a line.
    return done.stdout if done.returncode == 0 else f"py-spy: {done.stderr.strip()[-300:]}"
