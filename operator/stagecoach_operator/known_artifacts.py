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
from stagecoach_core.values import Found, Missing


def valid_answers(answers: Mapping[str, Found | Missing], first_seen: float) -> dict[str, Found | Missing]:
    """Return the store's answers that are valid for a run.

    What was asked before this operator first saw the run may have changed: another run may have made an artifact that
    was missing, and one that was found may have been deleted.
    """
    return {digest: answer for digest, answer in answers.items() if answer.at >= first_seen}


def known_artifacts(
    status: TrainingRunStatus,
    records: Iterable[AttemptStatus],
    storage: Storage,
    answers: Mapping[str, Found | Missing],
) -> dict[str, Found | Missing]:
    """Return what is known about artifacts, by stage digest. `records`: of all attempts. `answers`: of the store."""
    known: dict[str, Found | Missing] = dict(answers)
    for stage in status.stages:
        artifact = stage.artifact
        if artifact is not None and _lies_in(storage, artifact.uri, artifact.endpoint, artifact.stage_digest):
            found = Found(artifact.stage_digest, artifact.content_digest, artifact.uri)
            known[found.stage_digest] = found
    # Results last: they are newer than the status, and than a `Missing` looked up while the attempt was running.
    for record in records:
        result = _result(record, storage)
        if result is not None:
            known[record.digest] = result
    return known


def _result(record: AttemptStatus, storage: Storage) -> Found | None:
    """Return the artifact that an attempt has published in the run's present storage."""
    if record.ended is None or record.cause is not None or record.content_digest is None:
        return None
    # A trainer of an earlier version does not name the folder, which then follows from the digest.
    uri = record.artifact_uri or uri_below(storage.uri or "", output_prefix(record.digest))
    if not _lies_in(storage, uri, record.artifact_endpoint, record.digest):
        return None
    return Found(record.digest, record.content_digest, uri, at=record.ended.timestamp())


def _lies_in(storage: Storage, uri: str, endpoint: str | None, digest: str) -> bool:
    """Return whether an artifact is in a storage. `endpoint`: None if it was not recorded."""
    same_endpoint = endpoint is None or endpoint == (storage.endpoint or "")
    return same_endpoint and storage_of(uri, digest) == parse_location(storage.uri or "").uri.rstrip("/")
