"""Retries: each cause of failure has a budget per stage digest; the back-off grows with consecutive short failures.

Preemption (being asked to stop) is never charged. A failure counts for `retries.windowDays`, or until the stage's
digest changes or the user requests the run again, and one that followed on progress costs nothing: a training of months
on thousands of GPUs meets more lost nodes than a budget has, and none of them is its fault. A run with a permanent
fault ends nevertheless: an end that recurs without a new checkpoint becomes the user's (`policies.ending`), and however
slowly a run fails, `FRUITLESS_FACTOR` limits how often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Retries
from stagecoach_core.values import Attempt, Forgotten

DEFAULT_BUDGETS = Retries(infrastructure=20, hang=5, user=0, window_days=7)
"""The budgets of a run that sets none."""

CHARGED = (Cause.USER, Cause.HANG, Cause.INFRASTRUCTURE)
"""Causes with a budget. If several budgets are used up, the first of them is reported: it explains the failure best."""

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 300.0
SECONDS_PER_DAY = 86_400.0
FRUITLESS_FACTOR = 10
"""Failures without a new complete checkpoint, of any age, are at most this many times the budget. They cannot be as few
as the budget itself: an attempt that is killed does not report its checkpoints."""
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


def without_result(attempts: Iterable[Attempt], digest: str) -> tuple[Attempt, ...]:
    """Return the ended attempts at `digest`, oldest first.

    To be called when the store has no artifact: an attempt that reported success then has no result either.
    """
    counted = [attempt for attempt in attempts if not attempt.is_live and attempt.digest == digest]
    return tuple(sorted(counted, key=lambda attempt: attempt.number))


def decide_retry(ended: Sequence[Attempt], retries: Retries, older: Sequence[Forgotten] = ()) -> RetryDecision:
    """Decide whether a stage may be attempted again.

    `ended`: its ended attempts without a result, oldest first; those that are past (`Attempt.past`) are not charged,
    but lengthen the back-off. `older`: attempts before those, oldest first.
    """
    charged = [attempt for attempt in ended if not attempt.past]
    not_before = ended_at(ended[-1]) + _backoff(ended, older) if ended else 0.0
    failures = _failures(charged, older)
    restarts: Counter[Cause] = Counter()
    for failure in failures:
        restarts[failure.cause] += failure.count
    if not charged:
        return RetryDecision(dict(restarts), None, not_before)
    spent = {cause: text for cause in CHARGED if (text := _spent(cause, failures, retries))}
    exhausted = next(iter(spent), None)
    if exhausted is None:
        return RetryDecision(dict(restarts), None, not_before, _message(charged[-1]))
    last = next((attempt for attempt in reversed(charged) if charged_to(attempt) is exhausted), charged[-1])
    text = _message(last) if budget(exhausted, retries) == 0 else f"{_message(last)} ({spent[exhausted]})"
    return RetryDecision(dict(restarts), exhausted, message=text)


@dataclass(frozen=True)
class _Failure:
    """Failures that ended at one time."""

    cause: Cause
    count: int
    charged: int
    """Number of those that progress has not repaid."""
    at: float
    is_new: bool
    """Whether a checkpoint beyond all earlier ones was made before them."""


def _failures(charged: Sequence[Attempt], older: Sequence[Forgotten]) -> list[_Failure]:
    """Return all failures, oldest first."""
    failures: list[_Failure] = []
    newest = -1
    for group in older:
        is_new, newest = _progress(group.last_step, newest)
        failures += [
            _Failure(cause, count, count - group.repaid.get(cause, 0), group.until, is_new)
            for cause, count in group.counts.items()
            if count
        ]
    for item in charged:
        repaid = is_repaid(item, newest)
        is_new, newest = _progress(item.last_step, newest)
        failures.append(_Failure(charged_to(item), 1, int(not repaid), ended_at(item), is_new))
    return failures


def _progress(step: int | None, newest: int) -> tuple[bool, int]:
    """Return whether a checkpoint is beyond the newest one, and the newest of both."""
    return (False, newest) if step is None else (step > newest, max(step, newest))


def is_repaid(attempt: Attempt, newest: int) -> bool:
    """Return whether the progress of a failed attempt outweighs its failure, so that no budget is charged.

    It ran for at least `SETTLED_SECONDS` and made a checkpoint beyond `newest`, the newest step of those before it (-1
    without any). What the user can mend is never repaid.
    """
    progressed = attempt.last_step is not None and attempt.last_step > newest
    return progressed and attempt.running_seconds >= SETTLED_SECONDS and charged_to(attempt) is not Cause.USER


def _spent(cause: Cause, failures: Sequence[_Failure], retries: Retries) -> str:
    """Return how the budget of a cause is used up, as of its last failure. Empty if it is not.

    As of the last failure, not as of now: a stage that has failed does not come back when the window has passed.
    """
    alike = [failure for failure in failures if failure.cause is cause]
    if not alike:
        return ""
    allowed, days = budget(cause, retries), retries.window_days or DEFAULT_BUDGETS.window_days or 0
    begin = alike[-1].at - days * SECONDS_PER_DAY
    recent = sum(failure.charged for failure in alike if failure.at > begin)
    if recent > allowed:
        return f"failure {recent} charged to {cause.value} in {days} days; `retries.{cause.value}` is {allowed}"
    fruitless = 0
    for failure in failures:
        fruitless = (0 if failure.is_new else fruitless) + failure.charged * (failure.cause is cause)
    if fruitless > allowed * FRUITLESS_FACTOR:
        return f"failure {fruitless} charged to {cause.value} without a new checkpoint"
    return ""


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


def _backoff(ended: Sequence[Attempt], older: Sequence[Forgotten]) -> float:
    """Return the back-off in seconds. Preemptions and failures are separate streaks: neither lengthens the other's."""
    preempted = charged_to(ended[-1]) is Cause.PREEMPTION
    alike = [attempt for attempt in ended if (charged_to(attempt) is Cause.PREEMPTION) is preempted]
    counted = sum(
        count for group in older for cause, count in group.counts.items() if (cause is Cause.PREEMPTION) is preempted
    )
    streak = _streak(alike, counted)
    # A single preemption is retried immediately; repeated ones back off.
    return backoff_seconds(streak - 1 if preempted else streak)


def _streak(ended: Sequence[Attempt], older: int) -> int:
    """Return the number of attempts from the newest one that ran long (`SETTLED_SECONDS`) to the last one.

    `older`: number of attempts before `ended`, of which it is not known how long they ran.
    """
    streak = 0
    for attempt in reversed(ended):
        streak += 1
        # Not since `started`: time in a queue is not time run.
        if attempt.running_seconds >= SETTLED_SECONDS:
            return streak
    return streak + older


def _message(attempt: Attempt) -> str:
    if attempt.cause is None:
        return f"attempt {attempt.number} reported success, but the store has no artifact {attempt.digest[:12]}"
    return attempt.message or f"attempt {attempt.number} ended without a message ({attempt.cause.value})"
