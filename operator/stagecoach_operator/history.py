"""The bounded history of a stage's attempts in the run's status: what is kept one by one, and what is only counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from stagecoach_api.outcomes import Cause
from stagecoach_api.status import AttemptStatus, ForgottenAttempts, StageStatus, TrainingRunStatus
from stagecoach_core.policies.retry import charged_to
from stagecoach_core.values import Forgotten
from stagecoach_operator.observe import AttemptKey, Sight

MAX_ATTEMPTS = 8


def records_of(status: TrainingRunStatus) -> dict[AttemptKey, AttemptStatus]:
    """Return the attempts that a status tells of, by stage and number."""
    return {(stage.name, record.number): record for stage in status.stages for record in stage.attempts}


def forgotten_of(status: TrainingRunStatus) -> dict[tuple[str, str], Forgotten]:
    """Return the counted attempts that a status tells of, by stage and digest."""
    return {
        (stage.name, stage.forgotten.digest): Forgotten(_counts(stage.forgotten), stage.forgotten.until.timestamp())
        for stage in status.stages
        if stage.forgotten is not None
    }


def _counts(forgotten: ForgottenAttempts) -> dict[Cause, int]:
    return {cause: getattr(forgotten, cause.value) for cause in Cause}


def shortened(
    sights: Iterable[Sight], previous: StageStatus | None, now: float
) -> tuple[tuple[AttemptStatus, ...], ForgottenAttempts | None]:
    """Return the attempts of a stage that are kept, oldest first, and the count of those that are not.

    Living attempts are always kept. A count is of one digest: that of the newest attempt it holds.
    """
    every = sorted(sights, key=lambda sight: sight.record.number)
    surplus = max(0, len(every) - MAX_ATTEMPTS)
    dropped = [sight for sight in every[:surplus] if sight.record.ended is not None]
    gone = {sight.record.number for sight in dropped}
    kept = tuple(sight.record for sight in every if sight.record.number not in gone)[-MAX_ATTEMPTS:]
    return kept, _added(dropped, None if previous is None else previous.forgotten, now)


def _added(dropped: Sequence[Sight], before: ForgottenAttempts | None, now: float) -> ForgottenAttempts | None:
    for sight in dropped:
        attempt = sight.as_attempt(now)
        if sight.record.cause is None or sight.record.ended is None:
            continue
        counts = Counter(_counts(before)) if before is not None and before.digest == attempt.digest else Counter()
        counts[charged_to(attempt)] += 1
        numbers = {cause.value: counts[cause] for cause in Cause}
        before = ForgottenAttempts(digest=attempt.digest, until=sight.record.ended, **numbers)
    return before


def gpu_seconds(
    sights: Iterable[Sight], gpus: int, previous: StageStatus | None, told: Mapping[AttemptKey, AttemptStatus]
) -> int:
    """Return GPUs times seconds of the attempts that have ended, those a status has counted already taken over.

    `told`: the attempts of that status.
    """
    total = 0 if previous is None else previous.gpu_seconds
    for sight in sights:
        before = told.get(sight.key)
        begun, over = sight.record.running_since, sight.record.ended
        if begun is not None and over is not None and (before is None or before.ended is None):
            total += int(gpus * max(0.0, (over - begun).total_seconds()))
    return total
