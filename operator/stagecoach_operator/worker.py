"""A work queue with one task per run: requests made during a reconciliation are merged, and failures back off."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from stagecoach_operator.kube import Conflict, KubeError, Unavailable

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 60.0
MAX_CONCURRENT = 64
"""Reconciliations at the same time, over all runs."""
TURN_SECONDS = 300.0
"""Limit of one reconciliation, so that none keeps its place for ever: ten times that of a call to the API server."""


@dataclass
class Slot:
    """A run's place in the queue."""

    task: asyncio.Task[None] | None = None
    again: bool = False
    """Whether it was requested again during the reconciliation."""
    timer: asyncio.TimerHandle | None = None
    due: float = 0.0
    """When the timer fires, in seconds since the epoch."""
    failures: int = 0
    """Failed reconciliations in a row."""
    error: str = ""
    """Type of the error that ended the last of them. Empty if it did not fail."""
    pause: float = 0.0
    """Seconds to wait after the last of them."""
    busy_since: float | None = None
    """When the running reconciliation began (monotonic). None if none is running."""


@dataclass
class Workers:
    """Reconciles runs; never the same run twice at the same time."""

    reconcile: Callable[[str], Awaitable[float | None]]
    """Reconciles a run; returns when the next reconciliation is due, in seconds since the epoch."""
    clock: Callable[[], float] = time.time
    observe: Callable[[float, str], None] = lambda seconds, error: None
    """Called after each reconciliation with its time and the type of the error that ended it, or empty."""
    slots: dict[str, Slot] = field(default_factory=dict)
    _closing: bool = False

    def __post_init__(self) -> None:
        self._limit = asyncio.Semaphore(MAX_CONCURRENT)

    def enqueue(self, uid: str) -> None:
        """Request a reconciliation of a run: at once, or after the one that is running."""
        if self._closing:
            return
        slot = self.slots.setdefault(uid, Slot())
        # A flag instead of a count: reconciliation is level-triggered, so one more covers any number of events.
        slot.again = True
        if slot.task is None:
            if slot.timer is not None:
                slot.timer.cancel()
                slot.timer = None
            slot.task = asyncio.get_running_loop().create_task(self._work(uid, slot))

    def longest_running_seconds(self) -> float:
        """Return for how long the longest reconciliation has been running; 0 if none is."""
        begun = [slot.busy_since for slot in self.slots.values() if slot.busy_since is not None]
        return time.monotonic() - min(begun) if begun else 0.0

    async def close(self, seconds: float) -> None:
        """Start no more reconciliations; let running ones end, and cancel those that take longer than `seconds`."""
        self._closing = True
        for slot in self.slots.values():
            if slot.timer is not None:
                slot.timer.cancel()
        tasks = [slot.task for slot in self.slots.values() if slot.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()

    async def _work(self, uid: str, slot: Slot) -> None:
        due: float | None = None
        while slot.again and not self._closing:
            # Cleared before the observation: an event that arrives during it must lead to another reconciliation.
            slot.again = False
            async with self._limit:
                slot.busy_since = began = time.monotonic()
                due = await self._reconcile_once(uid, slot)
                slot.busy_since = None
                self.observe(time.monotonic() - began, slot.error)
            if slot.failures:
                await asyncio.sleep(slot.pause)  # even if events arrive meanwhile: they must not defeat the back-off
                slot.again = True
            elif due is not None and due <= self.clock():
                slot.again = True
                await asyncio.sleep(0)  # let other runs proceed
        # No `await` between the last check of `again` and this line, so no request is lost between them.
        slot.task = None
        if self._closing:
            return
        if due is not None:
            self._enqueue_at(uid, slot, due)
        else:
            self.slots.pop(uid, None)

    async def _reconcile_once(self, uid: str, slot: Slot) -> float | None:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                due = await self.reconcile(uid)
        except TimeoutError:
            self._after_failure(uid, slot, Unavailable(f"it took more than {TURN_SECONDS:.0f} s"))
            return None
        except KubeError as error:
            self._after_failure(uid, slot, error)
            return None
        except Exception:
            log.exception("run %s: unexpected error in its reconciliation; it is retried", uid)
            self._after_failure(uid, slot, Unavailable("unexpected error"))
            return None
        slot.failures, slot.error = 0, ""
        return due

    def _after_failure(self, uid: str, slot: Slot, error: KubeError) -> None:
        slot.failures += 1
        slot.error = type(error).__name__
        slot.pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (slot.failures - 1))
        if isinstance(error, Unavailable) and error.retry_after is not None:
            slot.pause = max(slot.pause, error.retry_after)
        if not isinstance(error, Conflict):  # a 409 is routine: the run has changed since it was observed
            log.warning("run %s: %s: %s; retried in %.1f s", uid, type(error).__name__, error, slot.pause)

    def _enqueue_at(self, uid: str, slot: Slot, due: float) -> None:
        slot.due = due
        delay = max(0.0, due - self.clock())
        slot.timer = asyncio.get_running_loop().call_later(delay, self._on_timer, uid, slot)

    def _on_timer(self, uid: str, slot: Slot) -> None:
        slot.timer = None
        self.enqueue(uid)
