"""Artifact lookups in S3, in the lane of the store's endpoint; results are cached.

A store the operator may not read is treated as empty: the stage's own pod then looks for a finished artifact, and its
result contains the digest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from stagecoach_api.spec import Storage
from stagecoach_api.store import AccessDenied, Store, StoreError
from stagecoach_api.stores.lookup import find_manifest
from stagecoach_api.stores.retry import OUTAGE_PAUSE_SECONDS
from stagecoach_api.writers import read_lease
from stagecoach_core.artifacts import look_up_result
from stagecoach_core.values import Claimed, Found, Missing
from stagecoach_operator.planning import open_storage
from stagecoach_operator.store_lanes import StoreLanes

T = TypeVar("T")

StoreKey = tuple[str, str, str]
"""URI, endpoint, region."""


@dataclass
class StoreState:
    """Results and state of the lookups in one store."""

    by_digest: dict[str, Found | Missing | Claimed] = field(default_factory=dict)
    reservations: dict[str, Claimed] = field(default_factory=dict)
    """The run that was last given a start at a digest, and when."""
    pending: set[str] = field(default_factory=set)
    """Digests being looked up."""
    error: str = ""
    """Why the last lookup failed. Empty if it succeeded."""
    not_before: float = 0.0
    """When it may be queried again, in seconds since the epoch."""
    unreadable: bool = False
    """Whether the operator is denied access to it."""


class ArtifactLookups:
    """Looks up whether artifacts exist."""

    def __init__(self, lanes: StoreLanes, clock: Callable[[], float] = time.time) -> None:
        self.lanes = lanes
        self._clock = clock
        self._states: dict[StoreKey, StoreState] = {}
        self._stores: dict[StoreKey, Store] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, storage: Storage) -> StoreState:
        """Return the state of a store."""
        return self._states.setdefault(store_key(storage), StoreState())

    def ask(self, storage: Storage, digest: str, on_result: Callable[[], None]) -> float | None:
        """Start a lookup unless the same one is pending; `on_result` is called when it has ended.

        Returns None, or, if the store is unavailable, when to try again in seconds since the epoch.
        """
        state = self.of(storage)
        now = self._clock()
        if digest in state.pending:
            return None
        if now < state.not_before:
            return state.not_before
        state.pending.add(digest)
        task = asyncio.get_running_loop().create_task(self._ask(storage, digest, on_result))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return None

    async def in_lane(self, storage: Storage, work: Callable[[Store], T]) -> T:
        """Call a function with the store, in a thread of its endpoint's lane. Raises AccessDenied for storage that the
        operator's settings do not allow."""
        return await self.lanes.of(storage).run(lambda: work(self._store(storage)))

    def _store(self, storage: Storage) -> Store:
        """Return the store, opened once, which is slow."""
        key = store_key(storage)
        if key not in self._stores:
            self._stores[key] = open_storage(storage)
        return self._stores[key]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _ask(self, storage: Storage, digest: str, on_result: Callable[[], None]) -> None:
        state = self.of(storage)
        started_at = self._clock()
        try:
            state.by_digest[digest] = await self.in_lane(storage, lambda store: _look_up(store, digest, started_at))
            state.error, state.unreadable = "", False
        except AccessDenied as error:
            state.by_digest[digest] = Missing(at=started_at)
            state.error, state.unreadable = error.message, True
        except StoreError as error:
            state.error = str(error)
            state.not_before = max(self._clock() + OUTAGE_PAUSE_SECONDS, self.lanes.of(storage).not_before)
        finally:
            state.pending.discard(digest)
            on_result()


def _look_up(store: Store, digest: str, now: float) -> Found | Missing | Claimed:
    manifest = find_manifest(store, digest)
    lease = None if manifest is not None else read_lease(store, digest)
    return look_up_result(digest, manifest, store.uri, now, lease)


def store_key(storage: Storage) -> StoreKey:
    return storage.uri or "", storage.endpoint or "", storage.region or ""
