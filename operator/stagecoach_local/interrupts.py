"""Ctrl-C and its kin, counted: the first asks for a clean stop, the second ends everything at once.

`stagecoach suspend` and `stagecoach cancel` ask from another process. However often they ask, it is a clean stop.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SUSPEND = signal.SIGUSR1
CANCEL = signal.SIGUSR2


class Interrupts:
    """Counts the signals that ask this process to stop, as long as it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self.cancelled = False
        """Whether the run is not to go on."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (*SIGNALS, SUSPEND, CANCEL):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Only numbers: a handler runs between any two instructions, where no lock may be taken.
        if number == CANCEL:
            self.cancelled = True
        if number in SIGNALS:
            self.count += 1
        else:
            self.count = max(self.count, 1)
