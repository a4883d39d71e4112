"""What is displayed of a run at one time: a row per stage; and the protocol of a display."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stagecoach_api.progress import ProgressEvent
from stagecoach_core.values import RunState, StageView


@dataclass(frozen=True)
class StageRow:
    """One stage at one time."""

    name: str
    kind: str
    view: StageView
    progress: ProgressEvent | None = None
    """Newest progress event of the newest attempt."""
    started: float | None = None
    """Start of the newest attempt, in seconds since the epoch. None if this invocation has started none."""
    seconds: float | None = None
    """Duration of a finished stage. None if it is not finished or the duration is not known."""
    ranks: int = 1
    log: Path | None = None
    eta: float | None = None
    """Estimated end of the current activity, in seconds since the epoch. None if not known."""
    expected: float | None = None
    """Estimated duration of the whole stage in seconds, from an earlier run or from its size. None if not known."""
    resumed_from: int | None = None
    """Step after which the newest attempt resumed. None if it started at the first one, or if that is not known."""
    saved_step: int | None = None
    """Step of the checkpoint that the newest attempt has left. None if it left none, or if it is still running."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one time."""

    run: str
    storage: str
    state: RunState
    now: float
    rows: tuple[StageRow, ...]
    message: str = ""
    started: float | None = None
    """Start of the driver, in seconds since the epoch. None if not known."""


class View(Protocol):
    """Displays snapshots of a run."""

    def show(self, snapshot: Snapshot) -> None:
        """Display the current state of the run. Called several times a second."""

    def notify(self, text: str) -> None:
        """Show a message to the user, such as the effect of Ctrl-C."""

    def close(self) -> None:
        """Restore the terminal."""
