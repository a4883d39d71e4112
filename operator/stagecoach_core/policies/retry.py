"""Retries: every cause of failure has a budget per stage digest; the back-off grows with a streak of short failures.

Being asked to stop (preemption) is never charged. A failure is forgotten when the stage's digest changes, or when the
user asks for the run once more (`Observed.since`): a budget never grows by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Retries
from stagecoach_core.values import Attempt

DEFAULT_BUDGETS = Retries(infrastructure=20, hang=5, user=0)
"""What `Retries` says where the run says nothing."""

CHARGED = (Cause.USER, Cause.HANG, Cause.INFRASTRUCTURE)
"""Causes with a budget, the one that explains most first."""

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 300.0
SETTLED_SECONDS = 600.0
"""An attempt that ran this long begins a new streak: the back-off after it is the first again."""


@dataclass(frozen=True)
class Verdict:
    """Whether, and when, another attempt may be made."""

    restarts: Mapping[Cause, int] = field(default_factory=dict)
    """Attempts that ended without a result, by cause, preempted ones included."""
    exhausted: Cause | None = None
    """The cause whose budget is spent. None: another attempt may be made."""
    not_before: float = 0.0
    """Seconds since the epoch at which the back-off ends."""
    message: str = ""
    """What the attempt that decided it said."""


def without_result(attempts: Iterable[Attempt], digest: str, since: float) -> tuple[Attempt, ...]:
    """Return the attempts at `digest` that ended at or after `since`, oldest first.

    The caller knows that there is no artifact, so even one that says it is done has no result.
    """
    counted = [
        attempt for attempt in attempts if not attempt.lives and attempt.digest == digest and ended_at(attempt) >= since
    ]
    return tuple(sorted(counted, key=lambda attempt: attempt.number))


def judge(ended: Sequence[Attempt], retries: Retries, older: Mapping[Cause, int] | None = None) -> Verdict:
    """Judge a stage by its ended attempts without a result, oldest first.

    `older`: how many there were before those, by what they were charged to.
    """
    if not ended:
        return Verdict(restarts=dict(older or {}))
    restarts = dict(Counter(charged_to(attempt) for attempt in ended) + Counter(older or {}))
    exhausted = next((cause for cause in CHARGED if restarts.get(cause, 0) > budget(cause, retries)), None)
    if exhausted is None:
        return Verdict(restarts, None, ended_at(ended[-1]) + _backoff(ended), _said(ended[-1]))
    last = next((attempt for attempt in reversed(ended) if charged_to(attempt) is exhausted), ended[-1])
    return Verdict(restarts, exhausted, message=_last_words(last, retries, exhausted, restarts[exhausted]))


def budget(cause: Cause, retries: Retries) -> int:
    """Return how often a failed attempt is made again; `cause` is one of `CHARGED`."""
    given: int | None = getattr(retries, cause.value)
    default: int = getattr(DEFAULT_BUDGETS, cause.value)
    return default if given is None else given


def charged_to(attempt: Attempt) -> Cause:
    """Return what an ended attempt without a result is charged to."""
    # One that says it is done, and whose artifact is not there, lost it on the way.
    return attempt.cause or Cause.INFRASTRUCTURE


def ended_at(attempt: Attempt) -> float:
    return attempt.started if attempt.ended is None else attempt.ended


def backoff_seconds(streak: int) -> float:
    """Return the pause after the `streak`-th failure in a row: 1, 2, 4 … seconds, at most five minutes."""
    if streak < 1:
        return 0.0
    return min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(streak - 1, 32))


def _backoff(ended: Sequence[Attempt]) -> float:
    preempted = charged_to(ended[-1]) is Cause.PREEMPTION
    alike = [attempt for attempt in ended if (charged_to(attempt) is Cause.PREEMPTION) is preempted]
    # Who is preempted once goes on at once; who is preempted again and again waits.
    return backoff_seconds(_streak(alike) - 1 if preempted else _streak(alike))


def _streak(ended: Sequence[Attempt]) -> int:
    """Count the attempts from the last one back to the newest that ran long."""
    streak = 0
    for attempt in reversed(ended):
        streak += 1
        begun = attempt.started if attempt.running_since is None else attempt.running_since
        if ended_at(attempt) - begun >= SETTLED_SECONDS:
            break
    return streak


def _said(attempt: Attempt) -> str:
    if attempt.cause is None:
        return f"attempt {attempt.number} says it is done, but the store has no artifact {attempt.digest[:12]}"
    return attempt.message or f"attempt {attempt.number} ended without a message ({attempt.cause.value})"


def _last_words(last: Attempt, retries: Retries, cause: Cause, failures: int) -> str:
    allowed = budget(cause, retries)
    if allowed == 0:
        return _said(last)
    return f"{_said(last)} (failure {failures} by {cause.value}; `retries.{cause.value}` is {allowed})"
