"""The cause that the end of an attempt is charged to.

An unexpected error may be a bug, a setting or a passing disturbance. A second attempt shows which. If it
recurs, of the same type at the same place and without a new checkpoint in between, only the user can change that. Ends
that have no fault (signals, lost nodes, an unreachable store) stay infrastructure, however often they recur.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stagecoach_api.outcomes import AttemptResult, Cause
from stagecoach_core.values import Attempt

RECURRING = frozenset({Cause.INFRASTRUCTURE, Cause.USER})
"""Causes of the ends that are compared: an attempt that was stopped did not fail on its own account."""


@dataclass(frozen=True)
class AttemptEnd:
    """What a driver records of the end of an attempt."""

    cause: Cause | None
    """`Attempt.cause`. None if it succeeded."""
    message: str
    """The result's message, preceded by that of a recurrence."""


def end_of_attempt(
    stop_cause: Cause | None, result: AttemptResult | None, earlier: Iterable[Attempt], number: int
) -> AttemptEnd:
    """Return what to record of the end of attempt `number`. To be called once, when it ends.

    `stop_cause`, `result`: as in `cause_of_end`. `earlier`: the ended attempts at the same stage and digest since the
    user requested the run.
    """
    cause = cause_of_end(stop_cause, result)
    message = "" if result is None else result.message
    before = None if result is None or stop_cause is not None else recurrence_of(result, cause, earlier)
    if before is None:
        return AttemptEnd(cause, message)
    text = (
        f"attempts {before.number} and {number} ended with the same error at the same place, without a new checkpoint "
        f"in between, so the next one would too: {message}"
    )
    return AttemptEnd(Cause.USER, text)


def cause_of_end(stop_cause: Cause | None, result: AttemptResult | None) -> Cause | None:
    """Return the cause of an attempt that has ended, regardless of earlier ones. None if it succeeded.

    `stop_cause`: cause of the `Stop` that the driver carried out on it, None if there was none. `result`: the result
    that the launcher wrote, None if it wrote none, which means that it was killed.

    Success counts even if the attempt was asked to stop just before. An attempt that was stopped because it hung or ran
    too long is charged for that, even if it then exited cleanly. A user error is always charged as such.
    """
    if result is not None and result.cause is None:
        return None
    own = Cause.INFRASTRUCTURE if result is None else result.cause
    if stop_cause is None:
        return own
    return Cause.USER if own is Cause.USER else stop_cause


def recurrence_of(result: AttemptResult, cause: Cause | None, earlier: Iterable[Attempt]) -> Attempt | None:
    """Return the last earlier attempt that failed in the same way, if no checkpoint was made since; else None."""
    if not result.fault or cause is not Cause.INFRASTRUCTURE:
        return None
    attempts = sorted(earlier, key=lambda attempt: attempt.number)
    alike = [item for item in attempts if item.fault == result.fault and item.cause in RECURRING]
    if not alike:
        return None
    newest = max(_step(item.last_step) for item in attempts if item.number <= alike[-1].number)
    since = [result.last_step, *(item.last_step for item in attempts if item.number > alike[-1].number)]
    return None if any(_step(step) > newest for step in since) else alike[-1]


def _step(step: int | None) -> int:
    return -1 if step is None else step
