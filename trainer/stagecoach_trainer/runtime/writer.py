"""The right of this attempt to write to its artifact (`stagecoach_api.writers`). Rank 0 holds it for all ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from stagecoach_api.artifacts import Manifest, ResolvedStage
from stagecoach_api.outcomes import ExitCode
from stagecoach_api.store import Store, StoreError
from stagecoach_api.stores.lookup import find_manifest
from stagecoach_api.writer_record import RENEWAL_SECONDS, WriterLease
from stagecoach_api.writers import read_lease, renew, take
from stagecoach_trainer.runtime.errors import Interrupted, StageError

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Pause between two looks at a lease that another attempt holds."""
RELEASE_SECONDS = 10.0

WEAK = (
    "the storage has no conditional writes (`If-None-Match`, `If-Match`): two attempts at the same artifact look "
    "before they write, which does not keep both from writing at the same moment"
)


class TakenOver(StageError):
    """Another attempt makes the artifact. Not this attempt's fault, so it is charged to no budget."""

    exit_code = ExitCode.INTERRUPTED


@dataclass
class Writer:
    """The right of an attempt to write. Without `acquire`, as on other ranks than the first, `check` does nothing."""

    store: Store
    stage: ResolvedStage
    stop: threading.Event
    """Set when the right is lost: training stops then, instead of at its next checkpoint."""
    wait: Callable[[float], bool] | None = None
    """Waits for a time; returns whether the stage was asked to stop meanwhile. None for `stop.wait`."""

    _lease: WriterLease | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def acquire(self) -> Manifest | None:
        """Take the right to write; return the manifest if another attempt has made the artifact before.

        While the attempt of another run holds it, waits until that one has renewed it, and so is alive (raises
        TakenOver), or has let it end. Raises TakenOver, Interrupted and StoreError.
        """
        first: WriterLease | None = None
        while True:
            taken, lease = take(self.store, self.stage)
            if taken:
                break
            made = find_manifest(self.store, self.stage.digest)
            if made is not None:
                return made
            first = first or lease
            if lease.record.is_same_work(self.stage) or lease.tag != first.tag:
                raise self._taken_over(lease)
            log.info("waiting: %s makes the same artifact, or was killed while it did", lease.record.title)
            if (self.wait or self.stop.wait)(min(LOOK_SECONDS, max(0.1, lease.remaining))):
                raise Interrupted("stopped while it waited for another run that makes the same artifact")
        self._lease = lease
        if not self.store.is_exclusive:
            log.warning("%s", WEAK)
        self._thread = threading.Thread(target=self._keep, name="writer lease", daemon=True)
        self._thread.start()
        return find_manifest(self.store, self.stage.digest) if lease.record.epoch > 1 else None

    def check(self) -> None:
        """Confirm the right to write, and renew it. Raises TakenOver if another attempt has it, and StoreError."""
        with self._lock:
            if self._lease is None:
                return
            renewed = renew(self.store, self.stage.digest, self._lease)
            if renewed is not None:
                self._lease = renewed
                return
        raise self._taken_over(read_lease(self.store, self.stage.digest))

    def release(self) -> None:
        """Give the right up, so that another attempt need not wait. A failure to do so is of no consequence."""
        self._ended.set()
        with self._lock:
            lease, self._lease = self._lease, None
        if lease is not None:
            try:
                renew(self.store, self.stage.digest, lease, release=True)
            except StoreError as error:
                log.info("the right to write could not be given up, and ends later: %s", error)

    def _keep(self) -> None:
        while not self._ended.wait(RENEWAL_SECONDS):
            try:
                self.check()
            except TakenOver as error:
                log.warning("%s", error)
                self.stop.set()
                return
            except StoreError as error:  # while the store does not answer, no other attempt can take it over either
                log.info("the right to write could not be renewed: %s", error)

    def _taken_over(self, lease: WriterLease | None) -> TakenOver:
        digest = self.stage.digest[:12]
        if lease is None:
            return TakenOver(f"artifact {digest} was deleted while this attempt worked on it")
        other = f"another attempt ({lease.record.title}, attempt {lease.record.attempt})"
        return TakenOver(f"{other} makes artifact {digest}: this one stops, and the stage waits for that artifact")
