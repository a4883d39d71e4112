"""Views of a run in progress: lines drawn in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stagecoach_api.status import ENDED, FINISHED, LIVING
from stagecoach_cli.display.rows import describe, overall_line, render_lines
from stagecoach_cli.display.screen import Screen
from stagecoach_core.snapshot import Snapshot, StageRow, View
from stagecoach_core.values import StageState

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_PHASES = 2.0

UNUSUAL = frozenset({StageState.RETRYING, StageState.SUSPENDED, StageState.SKIPPED})
"""Shown when a stage enters one of them, but not if it starts in it."""


# -- on a terminal -----------------------------------------------------------------------------------------------------


class LiveView:
    """Draws the stages and the run in place. What is drawn is removed at the end: the summary follows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._screen = Screen(console)
        self._newest: Snapshot | None = None

    def show(self, snapshot: Snapshot) -> None:
        self._newest = snapshot
        size, ascii_only = self._console.size, self._console.options.ascii_only
        width = max(1, size.width - 1)  # a character in the last column would make some terminals wrap
        # One line for the run, and one for the cursor.
        lines = render_lines(snapshot, width, ascii_only, room=max(1, size.height - 2), live=True)
        self._screen.draw([*lines, overall_line(snapshot, width, ascii_only)])

    def notify(self, text: str) -> None:
        self._screen.erase()
        self._console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
        if self._newest is not None:
            self.show(self._newest)

    def close(self) -> None:
        self._screen.erase()


# -- plain lines -------------------------------------------------------------------------------------------------------


@dataclass
class PlainView:
    """Writes a line when a stage changes or begins another activity, and a progress line every 15 seconds."""

    console: Console
    _shown: dict[str, tuple[StageState, int]] = field(default_factory=dict)
    """State and attempt last shown, by stage."""
    _activity: dict[str, str] = field(default_factory=dict)
    """Activity last shown, by stage."""
    _last_line: dict[str, float] = field(default_factory=dict)

    def show(self, snapshot: Snapshot) -> None:
        for row in snapshot.rows:
            self._show_row(row, snapshot.now)

    def notify(self, text: str) -> None:
        self._line(time.time(), text)

    def close(self) -> None:
        """Do nothing."""

    def _show_row(self, row: StageRow, now: float) -> None:
        state = (row.view.state, row.view.attempt)
        if self._shown.get(row.name) != state:
            previous = self._shown.get(row.name)
            self._shown[row.name] = state
            if row.view.state in LIVING | FINISHED | ENDED or (previous is not None and row.view.state in UNUSUAL):
                self._line(now, f"{row.name}: {_change(row, now)}")
            self._last_line[row.name] = now
        elif row.view.state is StageState.RUNNING and self._is_due(row, now):
            self._line(now, f"{row.name}: {describe(row, now)}")
            self._last_line[row.name] = now
            self._activity[row.name] = _activity(row)

    def _is_due(self, row: StageRow, now: float) -> bool:
        passed = now - self._last_line[row.name]
        is_new = self._activity.get(row.name, "") != _activity(row)
        return passed >= (SECONDS_BETWEEN_PHASES if is_new else SECONDS_BETWEEN_LINES)

    def _line(self, now: float, text: str) -> None:
        stamp = time.strftime("%H:%M:%S", time.localtime(now))
        self.console.print(f"{stamp} {text}", highlight=False, markup=False, soft_wrap=True)


def _activity(row: StageRow) -> str:
    return "" if row.progress is None else row.progress.unit or row.progress.activity


def _change(row: StageRow, now: float) -> str:
    """Return the line for a stage that has just entered its state."""
    view = row.view
    if view.state is StageState.RUNNING:
        ranks = f" on {row.ranks} ranks" if row.ranks > 1 else ""
        return f"started{ranks}" + (f", attempt {view.attempt}" if view.attempt > 1 else "")
    if view.state is StageState.SUCCEEDED:
        return f"done in {describe(row, now)}" if row.seconds is not None else describe(row, now)
    return describe(row, now)


def open_view(console: Console) -> View:
    """Return a live view if the console is a terminal, otherwise a view of plain lines."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)
