"""Questions to S3, asked in a bounded number of threads; answers are kept. The event loop never waits for S3.

Where the operator may not read a store, the stage's own pod answers: it finds a finished artifact by itself, and its
result names the digest. Such a store is treated as one that has nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from stagecoach_api.spec import Storage
from stagecoach_api.store import AccessDenied, Store, StoreError
from stagecoach_api.stores.lookup import find_manifest
from stagecoach_api.stores.retry import OUTAGE_PAUSE_SECONDS
from stagecoach_core.artifacts import look_up_result
from stagecoach_core.values import Found, Missing
from stagecoach_operator.planning import open_storage

T = TypeVar("T")

StoreKey = tuple[str, str, str]
"""URI, endpoint, region."""


@dataclass
class Answers:
    """What one store has said."""

    by_digest: dict[str, Found | Missing] = field(default_factory=dict)
    asking: set[str] = field(default_factory=set)
    trouble: str = ""
    """Why it does not answer. Empty: it does."""
    not_before: float = 0.0
    """When it is asked again, in seconds since the epoch."""
    unreadable: bool = False
    """The operator has no right to read it."""


class Lookups:
    """Asks stores whether artifacts exist."""

    def __init__(self, threads: int, clock: Callable[[], float] = time.time) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="store")
        self._clock = clock
        self._answers: dict[StoreKey, Answers] = {}
        self._stores: dict[StoreKey, Store] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, storage: Storage) -> Answers:
        """Return what a store has said so far."""
        return self._answers.setdefault(store_key(storage), Answers())

    def ask(self, storage: Storage, digest: str, on_answer: Callable[[], None]) -> float | None:
        """Ask whether there is an artifact, unless that is under way; `on_answer` is called when there is an answer.

        Returns when to ask again, in seconds since the epoch, where the store does not answer now.
        """
        answers = self.of(storage)
        now = self._clock()
        if digest in answers.asking:
            return None
        if now < answers.not_before:
            return answers.not_before
        answers.asking.add(digest)
        task = asyncio.get_running_loop().create_task(self._ask(storage, digest, on_answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return None

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do something that asks S3, among the same threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def store(self, storage: Storage) -> Store:
        """Return the store, opened once. Opening takes a while: call it in a thread."""
        key = store_key(storage)
        if key not in self._stores:
            self._stores[key] = open_storage(storage)
        return self._stores[key]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _ask(self, storage: Storage, digest: str, on_answer: Callable[[], None]) -> None:
        answers = self.of(storage)
        asked_at = self._clock()
        try:
            answers.by_digest[digest] = await self.in_thread(lambda: self._read(storage, digest, asked_at))
            answers.trouble, answers.unreadable = "", False
        except AccessDenied as error:
            answers.by_digest[digest] = Missing(at=asked_at)
            answers.trouble, answers.unreadable = error.message, True
        except StoreError as error:
            answers.trouble = str(error)
            answers.not_before = self._clock() + OUTAGE_PAUSE_SECONDS
        finally:
            answers.asking.discard(digest)
            on_answer()

    def _read(self, storage: Storage, digest: str, now: float) -> Found | Missing:
        store = self.store(storage)
        return look_up_result(digest, find_manifest(store, digest), store.uri, now)


def store_key(storage: Storage) -> StoreKey:
    return storage.uri or "", storage.endpoint or "", storage.region or ""
