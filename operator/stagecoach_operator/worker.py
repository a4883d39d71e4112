"""One task per run: wishes for a turn are merged while one is under way, and errors are followed by a longer pause."""

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
PARALLEL_TURNS = 64
"""Turns at the same time, over all runs."""


@dataclass
class Slot:
    """A run's place in the queue."""

    task: asyncio.Task[None] | None = None
    again: bool = False
    """Something happened during the turn."""
    timer: asyncio.TimerHandle | None = None
    due: float = 0.0
    """When the timer goes off, in seconds since the epoch."""
    failures: int = 0
    """Failed turns in a row."""
    pause: float = 0.0
    """Seconds to wait after the last of them."""
    busy_since: float | None = None
    """When the turn under way began (monotonic). None: none is."""


@dataclass
class Workers:
    """Gives every run its turns."""

    turn: Callable[[str], Awaitable[float | None]]
    """Does one turn of a run; returns when the next one is due, in seconds since the epoch."""
    clock: Callable[[], float] = time.time
    slots: dict[str, Slot] = field(default_factory=dict)
    _closing: bool = False

    def __post_init__(self) -> None:
        self._limit = asyncio.Semaphore(PARALLEL_TURNS)

    def wake(self, uid: str) -> None:
        """Ask for a turn of a run; at once, or after the one that is under way."""
        if self._closing:
            return
        slot = self.slots.setdefault(uid, Slot())
        slot.again = True
        if slot.task is None:
            if slot.timer is not None:
                slot.timer.cancel()
                slot.timer = None
            slot.task = asyncio.get_running_loop().create_task(self._work(uid, slot))

    def oldest_turn_seconds(self) -> float:
        """Return how long the longest turn has been under way; 0: none is."""
        begun = [slot.busy_since for slot in self.slots.values() if slot.busy_since is not None]
        return time.monotonic() - min(begun) if begun else 0.0

    async def close(self, seconds: float) -> None:
        """Start no more turns, and let those under way end."""
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
            slot.again = False
            async with self._limit:
                slot.busy_since = time.monotonic()
                due = await self._one_turn(uid, slot)
                slot.busy_since = None
            if slot.failures:
                await asyncio.sleep(slot.pause)  # whatever happens meanwhile: the API server must not be stormed
                slot.again = True
            elif due is not None and due <= self.clock():
                slot.again = True
                await asyncio.sleep(0)
        slot.task = None
        if self._closing:
            return
        if due is not None:
            self._wake_at(uid, slot, due)
        else:
            self.slots.pop(uid, None)

    async def _one_turn(self, uid: str, slot: Slot) -> float | None:
        try:
            due = await self.turn(uid)
        except KubeError as error:
            self._after_failure(uid, slot, error)
            return None
        except Exception:
            log.exception("run %s: its turn failed in an unforeseen way; it is tried again", uid)
            self._after_failure(uid, slot, Unavailable("unforeseen"))
            return None
        slot.failures = 0
        return due

    def _after_failure(self, uid: str, slot: Slot, error: KubeError) -> None:
        slot.failures += 1
        slot.pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (slot.failures - 1))
        if isinstance(error, Unavailable) and error.retry_after is not None:
            slot.pause = max(slot.pause, error.retry_after)
        if not isinstance(error, Conflict):
            log.warning("run %s: %s: %s; tried again in %.1f s", uid, type(error).__name__, error, slot.pause)

    def _wake_at(self, uid: str, slot: Slot, due: float) -> None:
        slot.due = due
        delay = max(0.0, due - self.clock())
        slot.timer = asyncio.get_running_loop().call_later(delay, self._on_timer, uid, slot)

    def _on_timer(self, uid: str, slot: Slot) -> None:
        slot.timer = None
        self.wake(uid)
