"""Measures how late the event loop is: the only thing by which one run could hold up all others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

BEAT_SECONDS = 0.5
"""How often the loop is asked for a turn."""


@dataclass
class LoopLag:
    """The lag of the event loop."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    observe: Callable[[float], None] = lambda seconds: None
    """Called with every measured lag, in seconds."""
    _beat_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._beat_at = self.clock()

    async def measure(self) -> None:
        """Measure until cancelled."""
        while True:
            began = self.clock()
            await self.sleep(BEAT_SECONDS)
            self._beat_at = self.clock()
            self.observe(max(0.0, self._beat_at - began - BEAT_SECONDS))

    def seconds(self) -> float:
        """Return by how much the next beat is late by now."""
        return max(0.0, self.clock() - self._beat_at - BEAT_SECONDS)
