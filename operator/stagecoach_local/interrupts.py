"""Stop signals, counted: the first Ctrl-C (or SIGTERM, SIGHUP) requests a clean stop, the second kills.

`stagecoach suspend` and `stagecoach cancel` send SUSPEND and CANCEL from another process. These always request a clean
stop, however often they are sent.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SUSPEND = signal.SIGUSR1
CANCEL = signal.SIGUSR2


class Interrupts:
    """Context manager that counts the signals that ask this process to stop."""

    def __init__(self) -> None:
        self.count = 0
        self.cancelled = False
        """The run is to be cancelled instead of suspended."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (*SIGNALS, SUSPEND, CANCEL):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Assignments only: a handler runs between any two bytecodes, possibly while this thread holds a lock.
        if number == CANCEL:
            self.cancelled = True
        if number in SIGNALS:
            self.count += 1
        else:
            self.count = max(self.count, 1)
