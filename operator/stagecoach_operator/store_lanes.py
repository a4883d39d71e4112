"""Calls to S3, in one small lane per endpoint: a store that does not answer holds up no run of another store.

A lane has a few threads, a bounded queue, a limit of time for each call, and a circuit breaker: an endpoint that does
not answer is left alone, longer each time. The event loop never waits for S3.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from stagecoach_api.spec import Storage
from stagecoach_api.store import AccessDenied, StoreError, Unreachable
from stagecoach_operator.settings import Settings
from stagecoach_operator.storage_access import AWS, FOLDER, place_of

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 30.0
"""How long an endpoint is left alone after a call without an answer; doubled after each further one."""
LONGEST_PAUSE_SECONDS = 600.0
LOOK_SECONDS = 12.0
"""Limit of one look at a store: two tries of a request by `CONTROL_PLANE`."""
MAX_WAITING = 5_000
"""Calls that may wait for a thread of one lane."""
MAX_IDLE_LANES = 256

LaneKey = tuple[str, str]
"""Endpoint, region. The region is part of it because a wrong one of a user's does not answer either."""


class Paused(Unreachable):
    """The endpoint is left alone, because it did not answer."""


@dataclass
class Lane:
    """The calls to one endpoint."""

    endpoint: str
    threads: int
    clock: Callable[[], float] = time.time
    error: str = ""
    """Why the endpoint is left alone. Empty if it answered the last time."""
    not_before: float = 0.0
    """Until when it is left alone, in seconds since the epoch."""
    failures: int = 0
    """Calls without an answer since the last answer."""
    calls: int = 0
    errors: int = 0
    running: int = 0
    waiting: int = 0
    _answers: int = 0

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.threads)

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting and not self.failures

    @property
    def is_paused(self) -> bool:
        return self.clock() < self.not_before

    async def run(self, work: Callable[[], T], seconds: float = LOOK_SECONDS) -> T:
        """Run a function that calls the store in one of the lane's threads.

        Raises what it raises, Paused while the endpoint is left alone, and Unreachable if it takes longer.
        """
        self._check()
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        if self.is_paused:  # since it began to wait
            self._slots.release()
            self._check()
        answers = self._answers
        self.calls += 1
        self.running += 1
        future = in_thread(work)
        # A thread cannot be ended: one that takes too long keeps its slot, and the lane gets narrower.
        future.add_done_callback(self._release)
        try:
            result = await asyncio.wait_for(asyncio.shield(future), seconds)
        except TimeoutError:
            error = Unreachable(self.endpoint, f"{self.endpoint} has not answered within {seconds:.0f} s")
            self._failed(error, answers)
            raise error from None
        except Unreachable as error:
            self._failed(error, answers)
            raise
        except StoreError:
            self.errors += 1
            self._answered()
            raise
        self._answered()
        return result

    def _check(self) -> None:
        if self.is_paused:
            seconds = self.not_before - self.clock()
            raise Paused(self.endpoint, f"{self.error}; it is left alone for another {seconds:.0f} s")
        if self.waiting >= MAX_WAITING:
            raise Paused(self.endpoint, f"{self.waiting:,} calls already wait for {self.endpoint}")

    def _release(self, future: asyncio.Future[T]) -> None:
        self.running -= 1
        self._slots.release()
        if not future.cancelled():
            future.exception()  # marks it as retrieved, if it is not awaited any more

    def _answered(self) -> None:
        self._answers += 1
        self.failures, self.error, self.not_before = 0, "", 0.0

    def _failed(self, error: StoreError, answers: int) -> None:
        """Count a call without an answer, unless another call has been answered since it began."""
        self.errors += 1
        if self._answers != answers:
            return
        # Calls that failed together count once: the pause is for the endpoint, not for each of them.
        if not self.is_paused:
            self.failures += 1
            pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (self.failures - 1))
            self.error, self.not_before = error.message, self.clock() + pause


@dataclass
class StoreLanes:
    """The lanes of all endpoints. The only way by which the operator reaches a store."""

    settings: Settings
    clock: Callable[[], float] = time.time
    lanes: dict[LaneKey, Lane] = field(default_factory=dict)

    def of(self, storage: Storage) -> Lane:
        """Return the lane of a run's storage. Raises AccessDenied if the operator may not use its credentials there."""
        place = place_of(storage.uri or "", storage.endpoint)
        if not self.settings.allows_place(place):
            raise AccessDenied(storage.uri or "", f"the operator's settings do not allow {place}")
        return self.of_endpoint(storage)

    def of_endpoint(self, storage: Storage) -> Lane:
        """Return the lane of a storage's endpoint, for calls whose places have been checked."""
        endpoint = place_of(storage.uri or "", storage.endpoint).endpoint
        key = (endpoint, "" if endpoint == FOLDER else storage.region or "")
        if key not in self.lanes:
            if len(self.lanes) > MAX_IDLE_LANES:
                self.lanes = {name: lane for name, lane in self.lanes.items() if not lane.is_idle}
            self.lanes[key] = Lane(endpoint or AWS, self.settings.store_threads, self.clock)
        return self.lanes[key]


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run a function in a thread of its own, which does not keep the process from ending, as those of a pool do."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="store", daemon=True).start()
    return future
