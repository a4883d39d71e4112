"""Suspending and cancelling a run of this folder, by a signal to its driver, which may run in another terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from stagecoach_api.status import ENDED, FINISHED
from stagecoach_core.values import RunState, StageState
from stagecoach_local.workspace import RunFolder

POLL_SECONDS = 0.2
CANCELLED = "the run is cancelled"


def signal_driver(folder: RunFolder, number: signal.Signals) -> int | None:
    """Send the run's driver a signal; return its process id, None if no driver is running."""
    driver = folder.driver
    if driver is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(driver, number)
    return driver


def wait_for_driver(folder: RunFolder, pause: Callable[[float], Any] = time.sleep) -> None:
    """Wait until no driver holds the run's lock."""
    while folder.is_locked:
        pause(POLL_SECONDS)


def mark_cancelled(folder: RunFolder) -> None:
    """Record a run that has no driver as cancelled. Raises RunLocked if a driver has started in the meantime."""
    with folder.lock():
        record = folder.load()
        if record is None or record.state in (RunState.COMPLETE, RunState.FAILED):
            return
        stages = {
            name: stage
            if stage.state in FINISHED | ENDED
            else stage.model_copy(update={"state": StageState.CANCELLED, "waiting_for": "", "message": CANCELLED})
            for name, stage in record.stages.items()
        }
        update = {"stages": stages, "state": RunState.CANCELLED, "message": "cancelled", "updated": time.time()}
        folder.save(record.model_copy(update=update))
