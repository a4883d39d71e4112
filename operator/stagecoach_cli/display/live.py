"""Views of a run in progress: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stagecoach_api.progress import ProgressEvent
from stagecoach_api.status import ENDED, FINISHED, LIVING
from stagecoach_cli.display.numbers import duration, metric, metric_label, quantity, short
from stagecoach_core.snapshot import Snapshot, StageRow, View
from stagecoach_core.values import StageState

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SECONDS_BETWEEN_LINES = 15.0
BAR_WIDTH = 20
NARROW_COLUMNS = 100
"""Terminals with fewer columns get a shorter bar and no kinds, to leave room for the description."""
NARROW_BAR_WIDTH = 10
ELAPSED_WIDTH = 9
SHOWN_METRICS = 3
FIRST_METRICS = ("loss", "reward", "kl", "tokensPerSecond")
"""Shown first if a stage reports them."""

UNUSUAL = frozenset({StageState.RETRYING, StageState.SUSPENDED, StageState.SKIPPED})
"""Shown when a stage enters one of them, but not if it starts in it."""

_ICONS: Mapping[StageState, tuple[str, str, str]] = {
    StageState.PENDING: ("·", ".", "dim"),
    StageState.RUNNING: ("▶", ">", "cyan"),
    StageState.STOPPING: ("■", "#", "yellow"),
    StageState.RETRYING: ("↻", "r", "yellow"),
    StageState.SUSPENDED: ("‖", "=", "yellow"),
    StageState.SUCCEEDED: ("✔", "+", "green"),
    StageState.CACHED: ("✔", "+", "green"),
    StageState.FAILED: ("✘", "x", "red"),
    StageState.CANCELLED: ("✘", "x", "yellow"),
    StageState.SKIPPED: ("–", "-", "dim"),
}
"""Icon, ASCII icon, style."""


# -- descriptions ------------------------------------------------------------------------------------------------------


def describe(row: StageRow) -> str:
    """Return the description of a stage that is shown next to its name and bar."""
    text = _DESCRIPTIONS.get(row.view.state, _describe_end)(row)
    restarts = row.view.restarts if row.view.state not in ENDED else {}  # failures are printed with their causes
    return f"{text}  restarted: {causes(row)}" if any(restarts.values()) else text


def causes(row: StageRow) -> str:
    """Return how often attempts failed, by cause, such as `infrastructure × 2, hang × 1`; empty if none did."""
    return ", ".join(f"{cause.value} × {count}" for cause, count in row.view.restarts.items() if count)


def _describe_finished(row: StageRow) -> str:
    how = "cached" if row.view.state is StageState.CACHED else "done"
    if row.view.state is StageState.SUCCEEDED and row.seconds is not None:
        how = duration(row.seconds)
    return f"{how}  {short(row.view.digest or '')}"


def _describe_running(row: StageRow) -> str:
    if row.progress is None:
        return "starting"
    left = "" if row.eta is None else f"  {duration(max(0.0, row.eta - row.progress.time))} left"
    return f"{describe_progress(row.progress)}{left}"


def _describe_waiting(row: StageRow) -> str:
    return f"waiting for {row.view.waiting_for}" if row.view.waiting_for else "waiting"


def _describe_retrying(row: StageRow) -> str:
    return f"retrying{_suffix(_first_line(row.view.message))}"


def _describe_end(row: StageRow) -> str:
    return f"{row.view.state.value.lower()}{_suffix(_first_line(row.view.message))}"


_DESCRIPTIONS: Mapping[StageState, Callable[[StageRow], str]] = {
    StageState.CACHED: _describe_finished,
    StageState.SUCCEEDED: _describe_finished,
    StageState.RUNNING: _describe_running,
    StageState.PENDING: _describe_waiting,
    StageState.RETRYING: _describe_retrying,
}


def describe_progress(event: ProgressEvent) -> str:
    """Return the activity, the amount done and the first metrics of a progress event."""
    parts = [event.activity]
    unit = f" {event.unit}" if event.unit else ""
    if event.total:
        parts.append(f"{quantity(event.done)}/{quantity(event.total)}{unit}")
    elif event.done:
        parts.append(f"{quantity(event.done)}{unit}")
    parts += [f"{metric_label(name)} {metric(event.metrics[name])}" for name in _shown(event.metrics)]
    return "  ".join(parts)


def _shown(metrics: Mapping[str, float]) -> list[str]:
    first = [name for name in FIRST_METRICS if name in metrics]  # fixed order, so that columns do not jump
    return (first + [name for name in metrics if name not in first])[:SHOWN_METRICS]


def _suffix(text: str) -> str:
    return f": {text}" if text else ""


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def _elapsed(row: StageRow, now: float) -> str:
    is_live = row.view.state in LIVING and row.started is not None
    return duration(now - row.started) if is_live and row.started is not None else ""


# -- on a terminal -----------------------------------------------------------------------------------------------------


def render_rows(snapshot: Snapshot, width: int, ascii_only: bool = False) -> RenderableType:
    """Return the live table: icon, name, kind, progress bar, description and elapsed time of each stage.

    `width`: columns of the terminal; below NARROW_COLUMNS the kind is omitted and the bar is shorter.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    is_narrow = width < NARROW_COLUMNS
    bar_width = NARROW_BAR_WIDTH if is_narrow else BAR_WIDTH
    kind_width = 0 if is_narrow else max(len(row.kind) for row in snapshot.rows)
    for column in (1, max(len(row.name) for row in snapshot.rows), kind_width, bar_width):
        if column:
            table.add_column(width=column, no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(width=ELAPSED_WIDTH, justify="right", no_wrap=True)
    for row in snapshot.rows:
        icon, plain, style = _ICONS[row.view.state]
        event = row.progress if row.view.state in LIVING else None
        bar: RenderableType = ""
        if event is not None:
            bar = ProgressBar(event.total or None, event.done, width=bar_width, pulse=not event.total)
        table.add_row(
            Text(plain if ascii_only else icon, style=style),
            Text(row.name, style="bold" if row.view.state in LIVING else ""),
            *([Text(row.kind, style="dim")] if kind_width else []),
            bar,
            Text(describe(row), style=style if row.view.state not in LIVING else ""),
            Text(_elapsed(row, snapshot.now), style="dim"),
        )
    return table


class LiveView:
    """Redraws a table in place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def show(self, snapshot: Snapshot) -> None:
        self._live.update(render_rows(snapshot, self._console.width, self._console.options.ascii_only), refresh=True)

    def notify(self, text: str) -> None:
        self._console.print(text, style="yellow", highlight=False)

    def close(self) -> None:
        self._live.stop()
        self._console.print()


# -- plain lines -------------------------------------------------------------------------------------------------------


@dataclass
class PlainView:
    """Writes a line when a stage changes, and a progress line every 15 seconds."""

    console: Console
    _shown: dict[str, tuple[StageState, int]] = field(default_factory=dict)
    """State and attempt last shown, by stage."""
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
                self._line(now, f"{row.name}: {_change(row)}")
            self._last_line[row.name] = now
        elif row.view.state is StageState.RUNNING and now - self._last_line[row.name] >= SECONDS_BETWEEN_LINES:
            self._line(now, f"{row.name}: {describe(row)}")
            self._last_line[row.name] = now

    def _line(self, now: float, text: str) -> None:
        stamp = time.strftime("%H:%M:%S", time.localtime(now))
        self.console.print(f"{stamp} {text}", highlight=False, markup=False, soft_wrap=True)


def _change(row: StageRow) -> str:
    """Return the line for a stage that has just entered its state."""
    view = row.view
    if view.state is StageState.RUNNING:
        ranks = f" on {row.ranks} ranks" if row.ranks > 1 else ""
        return f"started{ranks}" + (f", attempt {view.attempt}" if view.attempt > 1 else "")
    if view.state is StageState.SUCCEEDED:
        return f"done in {describe(row)}" if row.seconds is not None else describe(row)
    return describe(row)


def open_view(console: Console) -> View:
    """Return a live view if the console is a terminal, otherwise a view of plain lines."""
    return LiveView(console) if console.is_terminal else PlainView(console)
