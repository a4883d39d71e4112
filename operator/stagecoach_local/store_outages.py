"""A store that stops answering for a while delays a run, and does not end it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from stagecoach_api.store import Unreachable


@dataclass
class Patience:
    """Gives a store time that has answered before and then does not, after all its own retries.

    Stages that run need the store only at their end, so nothing is lost by waiting.
    """

    pause_seconds: float
    say: Callable[[str], None]
    clock: Callable[[], float] = time.time

    _answered: bool = False
    _again_at: float = 0.0

    def ask(self, act: Callable[[], None]) -> bool:
        """Do something that needs the store; return whether it answered.

        Raises Unreachable while the store has never answered, and every other error.
        """
        if self.clock() < self._again_at:
            return False
        try:
            act()
        except Unreachable as error:
            if not self._answered:
                raise
            self._again_at = self.clock() + self.pause_seconds
            self.say(f"storage does not answer, trying again in {self.pause_seconds:.0f} s: {error}")
            return False
        self._answered = True
        return True
