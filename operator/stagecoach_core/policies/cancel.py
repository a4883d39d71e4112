"""Cancellation: every living attempt ends and nothing starts again; what is finished stays."""

from __future__ import annotations

from stagecoach_api.outcomes import Cause
from stagecoach_core.values import Attempt, Stop


def stop_cancelled(attempt: Attempt, cancel: bool) -> Stop | None:
    """Return the order to stop an attempt of a cancelled run."""
    return Stop(attempt.stage, attempt.number, "the run is cancelled", Cause.PREEMPTION) if cancel else None
