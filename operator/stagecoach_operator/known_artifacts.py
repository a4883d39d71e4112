"""What is known about a run's artifacts: from its status, from the results of its attempts, and from the store.

A run's storage may be edited at any time. What an attempt published, and what a status names, counts only if it is in
the storage that the run has now; all else is looked up there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stagecoach_api.artifacts import output_prefix, storage_of, uri_below
from stagecoach_api.spec import Storage
from stagecoach_api.status import AttemptStatus, TrainingRunStatus
from stagecoach_api.stores.base import parse_location
from stagecoach_core.artifacts import without_own
from stagecoach_core.values import Claimed, Found, Missing
from stagecoach_operator.planning import FrozenPlan

CONFIRM_SECONDS = 600.0
"""How old an answer about an artifact may be when a stage starts that reads it."""

Answer = Found | Missing | Claimed


def valid_answers(answers: Mapping[str, Answer], first_seen: float, run_uid: str) -> dict[str, Answer]:
    """Return the store's answers that are valid for a run.

    What was asked before this operator first saw the run may have changed: another run may have made an artifact that
    was missing, and one that was found may have been deleted.
    """
    return {digest: without_own(answer, run_uid) for digest, answer in answers.items() if answer.at >= first_seen}


def known_artifacts(
    status: TrainingRunStatus,
    records: Iterable[AttemptStatus],
    storage: Storage,
    answers: Mapping[str, Answer],
    lost: frozenset[str] = frozenset(),
    readable: bool = True,
) -> dict[str, Answer]:
    """Return what is known about artifacts, by stage digest.

    `records`: of all attempts. `answers`: of the store. `lost`: see `lost_artifacts`. `readable`: whether the
    operator may read the storage.
    """
    known: dict[str, Answer] = dict(answers)
    for stage in status.stages:
        artifact = stage.artifact
        if artifact is not None and _lies_in(storage, artifact.uri, artifact.endpoint, artifact.stage_digest):
            found = Found(artifact.stage_digest, artifact.content_digest, artifact.uri)
            known[found.stage_digest] = found
    # Results last: they are newer than the status, and than a `Missing` looked up while the attempt was running.
    for record in records:
        result = _result(record, storage, readable)
        if result is not None:
            known[record.digest] = result
    return known | {digest: answers[digest] for digest in lost}


def unconfirmed(
    frozen: FrozenPlan, stage: str, artifacts: Mapping[str, Found], answers: Mapping[str, Answer], now: float
) -> list[str]:
    """Return the digests of artifacts that a stage reads and that the store has not confirmed for a while.

    An artifact may have been deleted since it was made, such as between a failure and a retry weeks later.
    """
    read = {reference.stage for _, reference in frozen.plan.stages[stage].stage.references() if reference.stage}
    found = [artifacts[name] for name in sorted(read)]
    known = {item.stage_digest: answers.get(item.stage_digest) for item in found}
    return [
        item.stage_digest
        for item in found
        if now - max(item.at, answer.at if isinstance(answer := known[item.stage_digest], Found) else 0.0)
        > CONFIRM_SECONDS
    ]


def lost_artifacts(
    asked: Iterable[str], answers: Mapping[str, Answer], records: Iterable[AttemptStatus]
) -> frozenset[str]:
    """Return the digests, of those asked about again, whose artifact no longer exists: their stages have to run again.

    An attempt that has ended since has made it again.
    """
    made = {record.digest: record.ended.timestamp() for record in records if record.ended and record.cause is None}
    missing = {digest: answers.get(digest) for digest in asked}
    return frozenset(
        digest
        for digest, answer in missing.items()
        if isinstance(answer, Missing | Claimed) and answer.at > made.get(digest, 0.0)
    )


def _result(record: AttemptStatus, storage: Storage, readable: bool) -> Found | None:
    """Return the artifact that an attempt has published in the run's present storage."""
    if record.ended is None or record.cause is not None or record.content_digest is None:
        return None
    # A trainer of an earlier version does not name the folder, so the store is asked. Where it cannot be, the folder
    # follows from the digest.
    if record.artifact_uri is None and readable:
        return None
    uri = record.artifact_uri or uri_below(storage.uri or "", output_prefix(record.digest))
    if not _lies_in(storage, uri, record.artifact_endpoint, record.digest):
        return None
    return Found(record.digest, record.content_digest, uri, at=record.ended.timestamp())


def _lies_in(storage: Storage, uri: str, endpoint: str | None, digest: str) -> bool:
    """Return whether an artifact is in a storage. `endpoint`: None if it was not recorded."""
    same_endpoint = endpoint is None or endpoint == (storage.endpoint or "")
    return same_endpoint and storage_of(uri, digest) == parse_location(storage.uri or "").uri.rstrip("/")
