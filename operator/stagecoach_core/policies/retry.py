"""Retries: each cause of failure has a budget per stage digest; the back-off grows with consecutive short failures.

Preemption (being asked to stop) is never charged. Failures count until the stage's digest changes or the user requests
the run again (`Observed.since`). They do not expire, so a run with a permanent fault ends however slowly it fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Retries
from stagecoach_core.values import Attempt

DEFAULT_BUDGETS = Retries(infrastructure=20, hang=5, user=0)
"""The budgets of a run that sets none."""

CHARGED = (Cause.USER, Cause.HANG, Cause.INFRASTRUCTURE)
"""Causes with a budget. If several budgets are used up, the first of them is reported: it explains the failure best."""

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 300.0
SETTLED_SECONDS = 600.0
"""An attempt that ran at least this long resets the back-off. Kubernetes resets that of a crashing container, whose
limit of 300 s is the same, after ten minutes as well."""


@dataclass(frozen=True)
class RetryDecision:
    """Whether, and when, a stage may be attempted again."""

    restarts: Mapping[Cause, int] = field(default_factory=dict)
    """Number of attempts that ended without a result by cause, including preemption."""
    exhausted: Cause | None = None
    """The cause whose budget is used up. None if another attempt may be made."""
    not_before: float = 0.0
    """When the back-off ends, in seconds since the epoch."""
    message: str = ""
    """Message of the attempt that determined the decision."""


def without_result(attempts: Iterable[Attempt], digest: str, since: float) -> tuple[Attempt, ...]:
    """Return the attempts at `digest` that ended at or after `since`, oldest first.

    To be called when the store has no artifact: an attempt that reported success then has no result either.
    """
    counted = [
        attempt
        for attempt in attempts
        if not attempt.is_live and attempt.digest == digest and ended_at(attempt) >= since
    ]
    return tuple(sorted(counted, key=lambda attempt: attempt.number))


def decide_retry(ended: Sequence[Attempt], retries: Retries, older: Mapping[Cause, int] | None = None) -> RetryDecision:
    """Decide whether a stage may be attempted again.

    `ended`: its ended attempts without a result, oldest first. `older`: number of attempts before those, by the cause
    they were charged to.
    """
    if not ended:
        return RetryDecision(restarts=dict(older or {}))
    restarts = dict(Counter(charged_to(attempt) for attempt in ended) + Counter(older or {}))
    exhausted = next((cause for cause in CHARGED if restarts.get(cause, 0) > budget(cause, retries)), None)
    if exhausted is None:
        return RetryDecision(restarts, None, ended_at(ended[-1]) + _backoff(ended), _message(ended[-1]))
    last = next((attempt for attempt in reversed(ended) if charged_to(attempt) is exhausted), ended[-1])
    return RetryDecision(restarts, exhausted, message=_exhausted_message(last, retries, exhausted, restarts[exhausted]))


def budget(cause: Cause, retries: Retries) -> int:
    """Return how many failures of this cause are retried. `cause`: one of `CHARGED`."""
    given: int | None = getattr(retries, cause.value)
    default: int = getattr(DEFAULT_BUDGETS, cause.value)
    return default if given is None else given


def charged_to(attempt: Attempt) -> Cause:
    """Return the cause that an ended attempt without a result is charged to."""
    # No cause: it reported success, but its artifact is not in the store. The artifact was lost on the way.
    return attempt.cause or Cause.INFRASTRUCTURE


def ended_at(attempt: Attempt) -> float:
    """Return when an attempt ended, in seconds since the epoch; its start if the end is not known."""
    return attempt.started if attempt.ended is None else attempt.ended


def backoff_seconds(streak: int) -> float:
    """Return the back-off after the `streak`-th consecutive failure: 1, 2, 4 … seconds, at most five minutes."""
    if streak < 1:
        return 0.0
    doublings = min(streak - 1, 32)  # bounded, because 2.0 ** 1024 overflows
    return min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0**doublings)


def _backoff(ended: Sequence[Attempt]) -> float:
    """Return the back-off in seconds. Preemptions and failures are separate streaks: neither lengthens the other's."""
    preempted = charged_to(ended[-1]) is Cause.PREEMPTION
    alike = [attempt for attempt in ended if (charged_to(attempt) is Cause.PREEMPTION) is preempted]
    # A single preemption is retried immediately; repeated ones back off.
    return backoff_seconds(_streak(alike) - 1 if preempted else _streak(alike))


def _streak(ended: Sequence[Attempt]) -> int:
    """Return the number of attempts from the newest one that ran long (`SETTLED_SECONDS`) to the last one."""
    streak = 0
    for attempt in reversed(ended):
        streak += 1
        # Not from `started`: time in a queue is not time run.
        begun = attempt.started if attempt.running_since is None else attempt.running_since
        if ended_at(attempt) - begun >= SETTLED_SECONDS:
            break
    return streak


def _message(attempt: Attempt) -> str:
    if attempt.cause is None:
        return f"attempt {attempt.number} reported success, but the store has no artifact {attempt.digest[:12]}"
    return attempt.message or f"attempt {attempt.number} ended without a message ({attempt.cause.value})"


def _exhausted_message(last: Attempt, retries: Retries, cause: Cause, failures: int) -> str:
    allowed = budget(cause, retries)
    if allowed == 0:
        return _message(last)
    return f"{_message(last)} (failure {failures} charged to {cause.value}; `retries.{cause.value}` is {allowed})"
