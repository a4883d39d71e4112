"""A temporary outage of the store delays a run instead of ending it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from stagecoach_api.store import Unreachable


@dataclass
class StoreOutages:
    """Tolerates an outage of a store that was reachable before. Retries of single requests are the store's own.

    Running stages need the store only when they end, so nothing is lost by waiting.
    """

    pause_seconds: float
    notify: Callable[[str], None]
    clock: Callable[[], float] = time.time

    _was_reachable: bool = False
    _retry_at: float = 0.0

    def call(self, request: Callable[[], None]) -> bool:
        """Call `request` unless an outage is pending; return whether it succeeded.

        Raises Unreachable if the store has never been reachable. Other errors are not caught.
        """
        if self.clock() < self._retry_at:
            return False
        try:
            request()
        except Unreachable as error:
            if not self._was_reachable:
                raise
            self._retry_at = self.clock() + self.pause_seconds
            self.notify(f"storage is not reachable, retrying in {self.pause_seconds:.0f} s: {error}")
            return False
        self._was_reachable = True
        return True
