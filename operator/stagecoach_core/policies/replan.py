"""Attempts that a change of the run has left behind: their work is no longer what the stage asks for."""

from __future__ import annotations

from stagecoach_api.outcomes import Cause
from stagecoach_core.values import Attempt, Stop


def stop_superseded(attempt: Attempt, digest: str | None, inputs_change: bool) -> Stop | None:
    """Return the order to stop an attempt at another digest than the stage has now.

    `digest`: the stage's. None: not known. `inputs_change`: it is not known because an input is made anew, not merely
    because the store has not answered yet.
    """
    if digest == attempt.digest or (digest is None and not inputs_change):
        return None
    reason = "an input is made anew" if digest is None else "the stage's settings or inputs have changed"
    return Stop(attempt.stage, attempt.number, reason, Cause.PREEMPTION)


def stop_removed(attempt: Attempt) -> Stop:
    """Return the order to stop an attempt of a stage that the run no longer has."""
    return Stop(attempt.stage, attempt.number, "the run no longer has this stage", Cause.PREEMPTION)


def stop_second(attempt: Attempt, newest: int) -> Stop | None:
    """Return the order to stop an attempt beside a newer one of the same stage; two never work at once."""
    if attempt.number == newest:
        return None
    return Stop(attempt.stage, attempt.number, f"attempt {newest} of the stage lives beside it", Cause.PREEMPTION)
