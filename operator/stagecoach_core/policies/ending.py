"""The cause that the end of an attempt is charged to.

An unexpected error may be a bug, a setting or a passing disturbance. A second attempt shows which. If it
recurs, of the same type at the same place and without a new checkpoint in between, only the user can change that. What
the cluster reports of an attempt (out of memory, no image, an exit code that has no meaning) depends on more than the
attempt, so it is tried once more. Ends that have no fault (signals, lost nodes, an unreachable store) stay
infrastructure, however often they recur.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stagecoach_api.outcomes import PROCESS_FAULT, WAITING_FAULT, AttemptResult, Cause
from stagecoach_core.values import Attempt

RECURRING = frozenset({Cause.INFRASTRUCTURE, Cause.USER})
"""Causes of the ends that are compared: an attempt that was stopped did not fail on its own account."""

PASSING = (PROCESS_FAULT, WAITING_FAULT)
"""Beginnings of the faults that are not errors of the trainer's own code."""


@dataclass(frozen=True)
class AttemptEnd:
    """What a driver records of the end of an attempt."""

    cause: Cause | None
    """`Attempt.cause`. None if it succeeded."""
    message: str
    """The result's message, preceded by `recurrence`."""
    recurrence: str = ""
    """That it failed as earlier attempts did, so that the user must change something. Empty if it did not."""


def end_of_attempt(
    stop_cause: Cause | None,
    result: AttemptResult | None,
    earlier: Iterable[Attempt],
    number: int,
    stop_fault: str = "",
) -> AttemptEnd:
    """Return what to record of the end of attempt `number`. To be called once, when it ends.

    `stop_cause`, `result`: as in `cause_of_end`. `earlier`: the ended attempts at the same stage and digest since the
    user requested the run. `stop_fault`: fault of the `Stop` that the driver carried out.
    """
    cause = cause_of_end(stop_cause, result)
    message = "" if result is None else result.message
    fault = stop_fault if stop_cause is not None else "" if result is None else result.fault or ""
    before = recurrence_of(fault, None if result is None else result.last_step, cause, earlier)
    if not before:
        return AttemptEnd(cause, message)
    recurrence = _recurred([item.number for item in before], number, fault)
    return AttemptEnd(Cause.USER, f"{recurrence}: {message}", recurrence)


def _recurred(before: Sequence[int], number: int, fault: str) -> str:
    numbers = ", ".join(map(str, before))
    same = "in the same way" if fault.startswith(PASSING) else "with the same error at the same place"
    return (
        f"attempts {numbers} and {number} ended {same}, without a new checkpoint in between, so the next one would too"
    )


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


def recurrence_of(
    fault: str, last_step: int | None, cause: Cause | None, earlier: Iterable[Attempt]
) -> tuple[Attempt, ...]:
    """Return the earlier attempts that failed in the same way, if they are enough to stop trying; else none.

    They are enough if there are as many as `tries` allows and no checkpoint was made since the first of them.
    """
    if not fault or cause is not Cause.INFRASTRUCTURE:
        return ()
    attempts = sorted(earlier, key=lambda attempt: attempt.number)
    alike = [item for item in attempts if item.fault == fault and item.cause in RECURRING][1 - tries(fault) :]
    if len(alike) < tries(fault) - 1:
        return ()
    newest = max(_step(item.last_step) for item in attempts if item.number <= alike[0].number)
    since = [last_step, *(item.last_step for item in attempts if item.number > alike[0].number)]
    return () if any(_step(step) > newest for step in since) else tuple(alike)


def tries(fault: str) -> int:
    """Return how many attempts may end with this fault, without a new checkpoint in between."""
    return 3 if fault.startswith(PASSING) else 2


def _step(step: int | None) -> int:
    return -1 if step is None else step
