"""Suspension: every living attempt saves a checkpoint and ends; nothing starts until the run is resumed."""

from __future__ import annotations

from stagecoach_api.outcomes import Cause
from stagecoach_core.values import Attempt, Stop

WAITING_FOR = "the run to be resumed"


def stop_suspended(attempt: Attempt, suspend: bool) -> Stop | None:
    """Return the order to stop an attempt of a suspended run."""
    return Stop(attempt.stage, attempt.number, "the run is suspended", Cause.PREEMPTION) if suspend else None
