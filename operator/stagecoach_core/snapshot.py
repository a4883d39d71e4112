"""A run as people see it at one moment: one row per stage, and the protocol of whatever displays it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stagecoach_api.progress import ProgressEvent
from stagecoach_core.values import RunState, StageView


@dataclass(frozen=True)
class StageRow:
    """One stage at one moment."""

    name: str
    kind: str
    view: StageView
    progress: ProgressEvent | None = None
    """Newest event of the newest attempt."""
    started: float | None = None
    """Start of the newest attempt, seconds since the epoch. None: no attempt of this invocation's plan."""
    seconds: float | None = None
    """How long the finished work took. None: it is not finished, or not known."""
    ranks: int = 1
    log: Path | None = None
    eta: float | None = None
    """When its work will probably be done, seconds since the epoch. None: not known."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    run: str
    storage: str
    state: RunState
    now: float
    rows: tuple[StageRow, ...]
    message: str = ""


class View(Protocol):
    """Shows snapshots as they come."""

    def show(self, snapshot: Snapshot) -> None:
        """Show the run as it is now; called several times a second."""

    def notify(self, text: str) -> None:
        """Show a message to the user, such as the effect of Ctrl-C."""

    def close(self) -> None:
        """Leave the terminal as it was."""
