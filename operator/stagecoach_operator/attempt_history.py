"""The bounded history of a stage's attempts in the run's status: recent ones are kept, older ones only counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from stagecoach_api.outcomes import Cause
from stagecoach_api.status import (
    AttemptStatus,
    FailureGroup,
    ForgottenAttempts,
    Restarts,
    StageStatus,
    TrainingRunStatus,
)
from stagecoach_core.policies.retry import charged_to, is_repaid
from stagecoach_core.values import Forgotten
from stagecoach_operator.attempt_times import running_seconds
from stagecoach_operator.observe import ObservedAttempt
from stagecoach_operator.requests import AttemptKey
from stagecoach_operator.termination import newest_step

MAX_ATTEMPTS = 8
MAX_GROUPS = 6
MAX_COUNT = 10**15
"""The largest number that a status can hold."""


def records_of(status: TrainingRunStatus) -> dict[AttemptKey, AttemptStatus]:
    """Return the attempts recorded in a status, by stage and number."""
    return {(stage.name, record.number): record for stage in status.stages for record in stage.attempts}


def forgotten_of(status: TrainingRunStatus) -> dict[tuple[str, str], tuple[Forgotten, ...]]:
    """Return the attempts counted in a status, by stage and digest."""
    return {
        (stage.name, stage.forgotten.digest): tuple(
            Forgotten(_counts(group), group.until.timestamp(), group.last_step, _counts(group.repaid))
            for group in groups_of(stage.forgotten)
        )
        for stage in status.stages
        if stage.forgotten is not None
    }


def groups_of(forgotten: ForgottenAttempts) -> tuple[FailureGroup, ...]:
    """Return the groups of the counted attempts; one of all of them if their ends are not known more closely."""
    return forgotten.groups or (FailureGroup(until=forgotten.until, **_numbers(_counts(forgotten))),)


def _counts(counted: Restarts) -> dict[Cause, int]:
    return {cause: getattr(counted, cause.value) for cause in Cause}


def _sum(*counted: Restarts) -> dict[str, int]:
    return _numbers(sum((Counter(_counts(item)) for item in counted), Counter[Cause]()))


def _numbers(counts: Mapping[Cause, int]) -> dict[str, int]:
    return {cause.value: min(MAX_COUNT, counts.get(cause, 0)) for cause in Cause}


def bounded(
    attempts: Iterable[ObservedAttempt],
    before: ForgottenAttempts | None,
    now: float,
    counted_from: int = 0,
    most: int = MAX_ATTEMPTS,
) -> tuple[tuple[AttemptStatus, ...], ForgottenAttempts | None]:
    """Return the attempts of a stage that are kept, oldest first, and the count of the others.

    `before`: the count so far. `counted_from`: number of the first attempt to count. Live attempts are always kept. The
    count is for one digest only, that of the newest attempt counted: failures of other work do not use up the retry
    budget.
    """
    every = sorted(attempts, key=lambda attempt: attempt.record.number)
    surplus = max(0, len(every) - most)
    dropped = [attempt for attempt in every[:surplus] if attempt.record.ended is not None]
    gone = {attempt.record.number for attempt in dropped}
    kept = tuple(attempt.record for attempt in every if attempt.record.number not in gone)[-MAX_ATTEMPTS:]
    counted = [item for item in dropped if item.record.number >= counted_from]
    return _with_newest_warnings(kept), _added(counted, before, now)


def _with_newest_warnings(records: tuple[AttemptStatus, ...]) -> tuple[AttemptStatus, ...]:
    """Return the records with warnings in the newest one only: those of earlier attempts would mostly repeat them."""
    earlier = (item.model_copy(update={"warnings": ()}) if item.warnings else item for item in records[:-1])
    return (*earlier, *records[-1:])


def _added(
    dropped: Sequence[ObservedAttempt], before: ForgottenAttempts | None, now: float
) -> ForgottenAttempts | None:
    for attempt in dropped:
        ended = attempt.as_core_attempt(now)
        if attempt.record.cause is None or attempt.record.ended is None:
            continue
        groups = groups_of(before) if before is not None and before.digest == ended.digest else ()
        numbers = _numbers({charged_to(ended): 1})
        newest = max((group.last_step for group in groups if group.last_step is not None), default=-1)
        repaid = Restarts(**numbers) if is_repaid(ended, newest) else Restarts()
        new = FailureGroup(until=attempt.record.ended, last_step=attempt.record.last_step, repaid=repaid, **numbers)
        groups = merged_groups((*groups, new))
        total = _sum(*groups)
        before = ForgottenAttempts(digest=ended.digest, until=groups[-1].until, groups=groups, **total)
    return before


def merged_groups(groups: tuple[FailureGroup, ...], most: int = MAX_GROUPS) -> tuple[FailureGroup, ...]:
    """Return at most `most` groups: the two whose ends are closest become one, which counts as long as its later."""
    while len(groups) > most:
        place = min(range(len(groups) - 1), key=lambda index: groups[index + 1].until - groups[index].until)
        first, second = groups[place : place + 2]
        step = newest_step((first.last_step, second.last_step))
        repaid = Restarts(**_sum(first.repaid, second.repaid))
        until = max(first.until, second.until)
        both = FailureGroup(until=until, last_step=step, repaid=repaid, **_sum(first, second))
        groups = (*groups[:place], both, *groups[place + 2 :])
    return groups


def gpu_seconds(
    attempts: Iterable[ObservedAttempt],
    gpus: int,
    previous: StageStatus | None,
    recorded: Mapping[AttemptKey, AttemptStatus],
) -> int:
    """Return the GPU seconds of all attempts that have ended: the previous total plus those that ended since.

    Time in which a queue held an attempt does not count.
    `recorded`: the attempts of the previous status.
    """
    total = 0 if previous is None else previous.gpu_seconds
    for attempt in attempts:
        before = recorded.get(attempt.key)
        over = attempt.record.ended
        if over is not None and (before is None or before.ended is None):
            total += int(gpus * running_seconds(attempt.record, over.timestamp()))
    return min(MAX_COUNT, total)
