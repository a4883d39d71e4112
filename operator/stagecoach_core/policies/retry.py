"""Retries: every cause of failure has a budget per stage digest; the back-off grows with a streak of short failures.

Being asked to stop (preemption) is never charged. A failure is forgotten when the stage's digest changes, or when the
user asks for the run once more (`Observed.since`): a budget never grows by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Retries
from stagecoach_core.values import Attempt

DEFAULT_BUDGETS = Retries(infrastructure=20, hang=5, user=0)
"""What `Retries` says where the run says nothing."""

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 300.0
SETTLED_SECONDS = 600.0
"""An attempt that ran this long ends a streak of failures: the next back-off is the first again."""


@dataclass(frozen=True)
class Verdict:
    """Whether, and when, another attempt may be made."""

    restarts: Mapping[Cause, int]
    """Attempts that ended without a result, by cause, preempted ones included."""
    exhausted: Cause | None = None
    """The cause whose budget is spent. None: another attempt may be made."""
    not_before: float = 0.0
    """Seconds since the epoch at which the back-off ends."""
    message: str = ""
    """What the last failed attempt said; for an exhausted budget also which."""


def judge(ended: Sequence[Attempt], retries: Retries) -> Verdict:
    """Judge a stage by its ended attempts without a result, oldest first; all at one digest, none forgiven."""
    restarts = Counter(_cause(attempt) for attempt in ended)
    if not ended:
        return Verdict(restarts={})
    exhausted = next((cause for cause in Cause if restarts[cause] > budget(cause, retries, restarts[cause])), None)
    if exhausted is not None:
        last = [attempt for attempt in ended if _cause(attempt) is exhausted][-1]
        return Verdict(restarts, exhausted, message=_exhausted_message(last, exhausted, retries, restarts[exhausted]))
    return Verdict(restarts, not_before=_backoff_end(ended), message=ended[-1].message)


def budget(cause: Cause, retries: Retries, preempted: int = 0) -> int:
    """Return how many attempts may end by `cause` before the next such end is the last. Preemption has no limit."""
    if cause is Cause.PREEMPTION:
        return preempted
    given: int | None = getattr(retries, cause.value)
    default: int = getattr(DEFAULT_BUDGETS, cause.value)
    return default if given is None else given


def backoff_seconds(streak: int) -> float:
    """Return the pause after the `streak`-th failure in a row: 1, 2, 4 … seconds, at most five minutes."""
    if streak < 1:
        return 0.0
    return min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(streak - 1, 32))


def _cause(attempt: Attempt) -> Cause:
    # An attempt that says it is done, and whose artifact is not there, lost it somewhere on the way.
    return attempt.cause or Cause.INFRASTRUCTURE


def _backoff_end(ended: Sequence[Attempt]) -> float:
    last = ended[-1]
    streak = _streak(ended)
    if _cause(last) is Cause.PREEMPTION:
        streak -= 1  # who is preempted once goes on at once; who is preempted again and again waits
    return (last.ended or last.started) + backoff_seconds(streak)


def _streak(ended: Sequence[Attempt]) -> int:
    """Count the attempts at the end of the list that were all short and ended like the last: charged, or preempted."""
    charged = _cause(ended[-1]) is not Cause.PREEMPTION
    streak = 0
    for attempt in reversed(ended):
        if (_cause(attempt) is not Cause.PREEMPTION) is not charged:
            continue
        if streak and _seconds(attempt) >= SETTLED_SECONDS:
            break
        streak += 1
        if _seconds(attempt) >= SETTLED_SECONDS:
            break
    return streak


def _seconds(attempt: Attempt) -> float:
    begun = attempt.started if attempt.running_since is None else attempt.running_since
    return (attempt.ended or begun) - begun


def _exhausted_message(last: Attempt, cause: Cause, retries: Retries, failures: int) -> str:
    said = last.message or f"attempt {last.number} ended without a message"
    allowed = budget(cause, retries)
    if cause is Cause.USER and allowed == 0:
        return said
    times = "once" if failures == 1 else f"{failures} times"
    return f"{said} (failed {times} by {cause.value}; `retries.{cause.value}` allows {allowed})"


def without_result(attempts: Iterable[Attempt], digest: str, since: float) -> tuple[Attempt, ...]:
    """Return the ended attempts at `digest` that count, oldest first. The caller knows that there is no artifact."""
    counted = [
        attempt
        for attempt in attempts
        if not attempt.lives and attempt.digest == digest and (attempt.ended or attempt.started) >= since
    ]
    return tuple(sorted(counted, key=lambda attempt: attempt.number))
