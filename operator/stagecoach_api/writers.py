"""The right to write to an artifact: `artifacts/<digest>/writer.json`, a lease with an epoch.

An attempt takes it at its start, renews it while it works, and confirms it before each checkpoint and before its
manifest. Every change is conditional on the version read before, so of several attempts one succeeds, and an attempt
that has lost the right learns it from its next write. The lease ends by the store's clock alone.

- A newer attempt of the same stage of a run takes it over at once: the driver has started it, so the older one is lost.
- Another run takes it over once it is released or has not been renewed for `LEASE_SECONDS`.
"""

from __future__ import annotations

import secrets

from pydantic import ValidationError

from stagecoach_api.artifacts import ResolvedStage, canonical_json, writer_key
from stagecoach_api.stores.base import Corrupt, NotFound, Stamped, Store, StoreError
from stagecoach_api.writer_record import LEASE_SECONDS, WriterLease, WriterRecord

MAX_TRIES = 20
"""Tries to take a lease that other attempts change at the same time."""


def read_lease(store: Store, digest: str) -> WriterLease | None:
    """Return the right to write to an artifact; None if no attempt has taken it. Raises Corrupt."""
    key = writer_key(digest)
    try:
        return _lease(store.read_stamped(key), key)
    except NotFound:
        return None


def _lease(found: Stamped, key: str) -> WriterLease:
    try:
        record = WriterRecord.model_validate_json(found.data)
    except ValidationError as error:
        text = f"is not the record of a writer ({error.errors()[0]['msg']}); delete it if no run makes the artifact"
        raise Corrupt(key, text) from error
    age = max(0.0, found.now - found.modified)
    return WriterLease(record, found.tag, 0.0 if record.released else LEASE_SECONDS - age)


def take(store: Store, stage: ResolvedStage) -> tuple[bool, WriterLease]:
    """Take the right to write for an attempt; return whether it has it now, and the lease, which may be another's."""
    key = writer_key(stage.digest)
    lease: WriterLease | None = None
    for _ in range(MAX_TRIES):
        record = _record(stage, 1 if lease is None else lease.record.epoch + 1)
        if lease is None:
            taken = store.commit(key, _data(record))
        else:
            taken = store.replace(key, _data(record), lease.tag) is not None
        # Read in any case: the answer may belong to a write that was lost, and a weak store lets two of them succeed.
        lease = read_lease(store, stage.digest)
        if lease is not None and lease.record == record:
            return True, lease
        if lease is not None and not taken and not may_take(lease, stage):
            return False, lease
    raise StoreError(key, "other attempts kept changing it; try again")


def may_take(lease: WriterLease, stage: ResolvedStage) -> bool:
    """Return whether an attempt may take the right over from its holder."""
    if not lease.is_alive:
        return True
    return lease.record.is_same_work(stage) and lease.record.attempt <= stage.attempt


def renew(store: Store, digest: str, lease: WriterLease, release: bool = False) -> WriterLease | None:
    """Renew a lease, or release it; return it as it is then, None if another attempt has taken it over."""
    record = lease.record.model_copy(update={"mark": secrets.token_hex(8), "released": release})
    tag = store.replace(writer_key(digest), _data(record), lease.tag)
    return None if tag is None else WriterLease(record, tag, LEASE_SECONDS)


def _record(stage: ResolvedStage, epoch: int) -> WriterRecord:
    return WriterRecord(
        namespace=stage.namespace,
        run=stage.run,
        run_uid=stage.run_uid,
        stage=stage.stage,
        attempt=stage.attempt,
        epoch=epoch,
        mark=secrets.token_hex(8),
    )


def _data(record: WriterRecord) -> bytes:
    return canonical_json(record.model_dump(mode="json"))
