"""The bounded history of a stage's attempts in the run's status: recent ones are kept, older ones only counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from stagecoach_api.outcomes import Cause
from stagecoach_api.status import AttemptStatus, ForgottenAttempts, StageStatus, TrainingRunStatus
from stagecoach_core.policies.retry import charged_to
from stagecoach_core.values import Forgotten
from stagecoach_operator.observe import AttemptKey, ObservedAttempt

MAX_ATTEMPTS = 8


def records_of(status: TrainingRunStatus) -> dict[AttemptKey, AttemptStatus]:
    """Return the attempts recorded in a status, by stage and number."""
    return {(stage.name, record.number): record for stage in status.stages for record in stage.attempts}


def forgotten_of(status: TrainingRunStatus) -> dict[tuple[str, str], Forgotten]:
    """Return the attempts counted in a status, by stage and digest."""
    return {
        (stage.name, stage.forgotten.digest): Forgotten(_counts(stage.forgotten), stage.forgotten.until.timestamp())
        for stage in status.stages
        if stage.forgotten is not None
    }


def _counts(forgotten: ForgottenAttempts) -> dict[Cause, int]:
    return {cause: getattr(forgotten, cause.value) for cause in Cause}


def bounded(
    attempts: Iterable[ObservedAttempt], previous: StageStatus | None, now: float
) -> tuple[tuple[AttemptStatus, ...], ForgottenAttempts | None]:
    """Return the attempts of a stage that are kept, oldest first, and the count of the others.

    Live attempts are always kept. The count is for one digest only, that of the newest attempt counted: failures of
    other work do not use up the retry budget.
    """
    every = sorted(attempts, key=lambda attempt: attempt.record.number)
    surplus = max(0, len(every) - MAX_ATTEMPTS)
    dropped = [attempt for attempt in every[:surplus] if attempt.record.ended is not None]
    gone = {attempt.record.number for attempt in dropped}
    kept = tuple(attempt.record for attempt in every if attempt.record.number not in gone)[-MAX_ATTEMPTS:]
    return _with_newest_warnings(kept), _added(dropped, None if previous is None else previous.forgotten, now)


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
        counts = Counter(_counts(before)) if before is not None and before.digest == ended.digest else Counter()
        counts[charged_to(ended)] += 1
        numbers = {cause.value: counts[cause] for cause in Cause}
        before = ForgottenAttempts(digest=ended.digest, until=attempt.record.ended, **numbers)
    return before


def gpu_seconds(
    attempts: Iterable[ObservedAttempt],
    gpus: int,
    previous: StageStatus | None,
    recorded: Mapping[AttemptKey, AttemptStatus],
) -> int:
    """Return the GPU seconds of all attempts that have ended: the previous total plus those that ended since.

    `recorded`: the attempts of the previous status.
    """
    total = 0 if previous is None else previous.gpu_seconds
    for attempt in attempts:
        before = recorded.get(attempt.key)
        begun, over = attempt.record.running_since, attempt.record.ended
        if begun is not None and over is not None and (before is None or before.ended is None):
            total += int(gpus * max(0.0, (over - begun).total_seconds()))
    return total
