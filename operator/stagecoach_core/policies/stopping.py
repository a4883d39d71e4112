"""Reasons to stop a live attempt, except those that depend on time (`timeout.py`).

None of them is the attempt's fault, so all are charged as preemption: it saves a checkpoint and costs no retry.
"""

from __future__ import annotations

from stagecoach_api.outcomes import Cause
from stagecoach_core.values import Attempt, Stop


def stop_cancelled(attempt: Attempt, cancel: bool) -> Stop | None:
    """Return the order to stop an attempt of a cancelled run. Finished stages stay finished."""
    return _stop(attempt, "the run is cancelled") if cancel else None


def stop_suspended(attempt: Attempt, suspend: bool) -> Stop | None:
    """Return the order to stop an attempt of a suspended run. Nothing starts until the run is resumed."""
    return _stop(attempt, "the run is suspended") if suspend else None


def stop_unselected(attempt: Attempt, selected: frozenset[str] | None) -> Stop | None:
    """Return the order to stop an attempt of a stage that is not selected (`Observed.selected`)."""
    if selected is None or attempt.stage in selected:
        return None
    return _stop(attempt, "the stage is not selected")


def stop_superseded(attempt: Attempt, digest: str | None, inputs_change: bool) -> Stop | None:
    """Return the order to stop an attempt whose digest is no longer its stage's.

    `digest`: the stage's current digest, None if unknown. `inputs_change`: it is unknown because an input is being
    re-created. An attempt is not stopped only because the store has not answered yet.
    """
    if digest == attempt.digest or (digest is None and not inputs_change):
        return None
    changed = "the stage's settings or inputs have changed"
    return _stop(attempt, "an input is being re-created" if digest is None else changed)


def stop_removed(attempt: Attempt) -> Stop:
    """Return the order to stop an attempt of a stage that the run no longer has."""
    return _stop(attempt, "the run no longer has this stage")


def stop_duplicate(attempt: Attempt, newest: int) -> Stop | None:
    """Return the order to stop an attempt if its stage has a newer one; two attempts never work at the same time."""
    if attempt.number == newest:
        return None
    return _stop(attempt, f"attempt {newest} of the stage replaces it")


def _stop(attempt: Attempt, reason: str) -> Stop:
    return Stop(attempt.stage, attempt.number, reason, Cause.PREEMPTION)
