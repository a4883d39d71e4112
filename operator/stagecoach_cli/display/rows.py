"""The lines of a run in progress: one for each stage, fitted to the terminal, and one for the run as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagecoach_api.progress import STEPS, TRAIN, ProgressEvent
from stagecoach_api.status import ENDED, FINISHED, LIVING
from stagecoach_cli.display.numbers import duration, metric, metric_label, quantity, short
from stagecoach_core.snapshot import Snapshot, StageRow
from stagecoach_core.values import StageState

if TYPE_CHECKING:
    from rich.text import Text

WIDE_COLUMNS = 120
"""Terminals with at least as many columns also show the stages' kinds and how long they have been running."""
BAR_WIDTH = 20
NARROW_BAR_WIDTH = 8
BARLESS_COLUMNS = 60
"""Below as many columns there is no bar."""
ELAPSED_WIDTH = 9
LONGEST_NAME_SHARE = 4
"""A stage's name takes at most this fraction of the columns."""
GAP = "  "
FIRST_METRICS = ("loss", "reward", "kl")
"""Shown first if a stage reports them."""
SPEED = "tokensPerSecond"
PLACE = ("batch", "batches")
"""Metrics by which a training loop reports how far an activity between two steps has come."""

ICONS: Mapping[StageState, tuple[str, str, str]] = {
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


@dataclass(frozen=True)
class Part:
    """A part of a description; where columns are few, parts with the highest `order` are left out first."""

    text: str
    order: int = 0


AMOUNT, LEFT, TOKENS_PER_SECOND, PLACE_ORDER, FIRST_METRIC, RESTARTS, REST = range(7)
"""Orders of parts."""


def describe(row: StageRow, now: float) -> str:
    """Return the whole description of a stage. `now`: seconds since the epoch."""
    return GAP.join(part.text for part in parts_of(row, now))


def fit(parts: Sequence[Part], width: int) -> str:
    """Return the parts that fit `width` columns, in their order; the last one left is cut."""
    from rich.cells import cell_len, set_cell_size

    kept = list(parts)
    while len(kept) > 1 and cell_len(GAP.join(part.text for part in kept)) > width:
        kept.remove(max(reversed(kept), key=lambda part: part.order))
    text = GAP.join(part.text for part in kept)
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + "…"


def parts_of(row: StageRow, now: float) -> list[Part]:
    """Return the parts of a stage's description."""
    parts = _running(row, now) if row.view.state is StageState.RUNNING else [Part(_at_rest(row))]
    restarts = row.view.restarts if row.view.state not in ENDED else {}  # failures are printed with their causes
    if any(restarts.values()):
        parts.append(Part(f"restarted: {causes(row)}", RESTARTS))
    return parts


def causes(row: StageRow) -> str:
    """Return how often attempts failed, by cause, such as `infrastructure × 2, hang × 1`; empty if none did."""
    return ", ".join(f"{cause.value} × {count}" for cause, count in row.view.restarts.items() if count)


def _at_rest(row: StageRow) -> str:
    return _DESCRIPTIONS.get(row.view.state, _describe_end)(row)


def _describe_finished(row: StageRow) -> str:
    how = "cached" if row.view.state is StageState.CACHED else "done"
    if row.view.state is StageState.SUCCEEDED and row.seconds is not None:
        how = duration(row.seconds)
    return f"{how}  {short(row.view.digest or '')}"


def _describe_waiting(row: StageRow) -> str:
    if row.saved_step is not None:
        return f"stopped, saved at step {row.saved_step:,}"
    return f"waiting for {row.view.waiting_for}" if row.view.waiting_for else "waiting"


def _describe_retrying(row: StageRow) -> str:
    return f"retrying{_suffix(_first_line(row.view.message))}"


def _describe_end(row: StageRow) -> str:
    return f"{row.view.state.value.lower()}{_suffix(_first_line(row.view.message))}"


_DESCRIPTIONS: Mapping[StageState, Callable[[StageRow], str]] = {
    StageState.CACHED: _describe_finished,
    StageState.SUCCEEDED: _describe_finished,
    StageState.PENDING: _describe_waiting,
    StageState.SUSPENDED: _describe_waiting,
    StageState.RETRYING: _describe_retrying,
}


def _suffix(text: str) -> str:
    return f": {text}" if text else ""


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


# -- running stages ----------------------------------------------------------------------------------------------------


def _running(row: StageRow, now: float) -> list[Part]:
    event = row.progress
    if event is None:
        return [Part("starting"), *_age(row.started, now)]
    names = [name for name in FIRST_METRICS if name in event.metrics]  # fixed order, so that columns do not jump
    rest = [name for name in event.metrics if name not in (*names, SPEED, *PLACE)]
    return [
        *_amounts(event),
        *(Part(_figure(name, event), FIRST_METRIC) for name in names),
        *(Part(_figure(name, event), REST) for name in rest[:1]),
        *([Part(f"{metric(event.metrics[SPEED])} tok/s", TOKENS_PER_SECOND)] if SPEED in event.metrics else []),
        *_time_left(row, event, now),
    ]


def _figure(name: str, event: ProgressEvent) -> str:
    return f"{metric_label(name)} {metric(event.metrics[name])}"


def _amounts(event: ProgressEvent) -> list[Part]:
    if event.unit == STEPS and event.total:
        step = Part(f"step {quantity(event.done)}/{quantity(event.total)}", AMOUNT)
        return [step] if event.activity == TRAIN else [step, Part(event.activity + _place(event), PLACE_ORDER)]
    unit = f" {event.unit}" if event.unit else ""
    if event.total:
        return [Part(f"{event.activity} {quantity(event.done)}/{quantity(event.total)}{unit}", AMOUNT)]
    return [Part(f"{event.activity} {quantity(event.done)}{unit}" if event.done else event.activity, AMOUNT)]


def _place(event: ProgressEvent) -> str:
    done, total = (event.metrics.get(name) for name in PLACE)
    return "" if done is None or total is None else f" {quantity(done)}/{quantity(total)}"


def _time_left(row: StageRow, event: ProgressEvent, now: float) -> list[Part]:
    """Return the time left, from the pace or else from an earlier run; without either, the age of the activity."""
    if row.eta is not None:
        return [Part(f"{duration(max(0.0, row.eta - now))} left", LEFT)]
    left = expected_left(row, now)
    if left is not None:
        return [Part(f"~{duration(left)} left", LEFT)]
    return [Part("? left", LEFT)] if event.unit == STEPS else _age(event.time, now)


def expected_left(row: StageRow, now: float) -> float | None:
    """Return the time left according to `row.expected`; None if there is none, or if the stage takes longer."""
    if row.expected is None:
        return None
    left = row.expected - (0.0 if row.started is None else now - row.started)
    return left if left > 0 else None


def _age(since: float | None, now: float) -> list[Part]:
    return [] if since is None or now - since < 1.0 else [Part(duration(now - since), LEFT)]


# -- one line for each stage -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hidden:
    """Stages for which the terminal has no line."""

    states: frozenset[StageState]
    count: int
    what: str


def chosen_rows(rows: Sequence[StageRow], room: int) -> list[StageRow | Hidden]:
    """Return the stages to show in at most `room` lines, in the order of the run, and the counts of the others.

    What runs or needs attention comes first, then what starts next, then what finished last.
    """
    if len(rows) <= room:
        return list(rows)
    room = max(1, room - 2)  # two lines for the counts
    active = [index for index, row in enumerate(rows) if row.view.state in LIVING]
    notable = [index for index, row in enumerate(rows) if row.view.state not in LIVING | _QUIET]
    waiting = [index for index, row in enumerate(rows) if row.view.state is StageState.PENDING]
    finished = [index for index, row in enumerate(rows) if row.view.state in FINISHED]
    kept = set([*active, *notable, *waiting, *reversed(finished)][:room])
    hidden = [row for index, row in enumerate(rows) if index not in kept]
    done = sum(row.view.state in FINISHED for row in hidden)
    shown: list[StageRow | Hidden] = [row for index, row in enumerate(rows) if index in kept]
    before = [Hidden(FINISHED, done, "finished")] if done else []
    rest = len(hidden) - done
    return [*before, *shown, *([Hidden(frozenset({StageState.PENDING}), rest, "to come")] if rest else [])]


_QUIET = FINISHED | {StageState.PENDING, StageState.SKIPPED}


def render_lines(
    snapshot: Snapshot, width: int, ascii_only: bool = False, room: int | None = None, live: bool = False
) -> list[Text]:
    """Return the lines of the stages.

    `width`: columns of the terminal. `room`: the most lines; None for a line for every stage. `live`: with bars.
    """
    rows = chosen_rows(snapshot.rows, len(snapshot.rows) if room is None else room)
    layout = ColumnWidths.of(snapshot, [row for row in rows if isinstance(row, StageRow)], width, ascii_only, live)
    return [layout.line(row) if isinstance(row, StageRow) else layout.count(row) for row in rows]


@dataclass(frozen=True)
class ColumnWidths:
    """Widths of the columns; 0 for a column that is left out."""

    name: int
    kind: int
    bar: int
    text: int
    elapsed: int
    ascii_only: bool
    now: float

    @classmethod
    def of(cls, snapshot: Snapshot, rows: Sequence[StageRow], width: int, ascii_only: bool, live: bool) -> ColumnWidths:
        """Return the layout of the stages' lines in `width` columns."""
        wide = width >= WIDE_COLUMNS
        name = min(max((len(row.name) for row in rows), default=0), max(8, width // LONGEST_NAME_SHARE))
        kind = max((len(row.kind) for row in rows), default=0) if wide else 0
        has_bar = live and width >= BARLESS_COLUMNS and any(row.view.state in LIVING for row in rows)
        bar = (BAR_WIDTH if wide else NARROW_BAR_WIDTH) if has_bar else 0
        elapsed = ELAPSED_WIDTH if wide else 0
        used = 1 + sum(len(GAP) + column for column in (name, kind, bar, elapsed) if column) + len(GAP)
        return cls(name, kind, bar, max(1, width - used), elapsed, ascii_only, snapshot.now)

    def line(self, row: StageRow) -> Text:
        """Return the line of a stage."""
        from rich.text import Text

        icon, plain, style = ICONS[row.view.state]
        living = row.view.state in LIVING
        line = Text(plain if self.ascii_only else icon, style=style, no_wrap=True, end="")
        name = row.name if len(row.name) <= self.name else f"{row.name[: self.name - 1]}…"
        line.append(GAP + name.ljust(self.name), style="bold" if living else "")
        if self.kind:
            line.append(GAP + row.kind.ljust(self.kind), style="dim")
        if self.bar:
            line.append_text(self._bar(row))
        text = fit(parts_of(row, self.now), self.text)
        elapsed = _elapsed(row, self.now) if self.elapsed else ""
        line.append(GAP + (text.ljust(self.text) if elapsed else text), style="" if living else style)
        if elapsed:
            line.append(GAP + elapsed.rjust(self.elapsed), style="dim")
        line.rstrip()
        return line

    def _bar(self, row: StageRow) -> Text:
        from rich.text import Text

        event = row.progress if row.view.state in LIVING else None
        if event is None or not event.total:
            return Text(GAP + " " * self.bar)
        return Text(GAP).append_text(bar(event.done / event.total, self.bar, self.ascii_only))

    def count(self, hidden: Hidden) -> Text:
        """Return the line for stages that have none of their own."""
        from rich.text import Text

        icon, plain, style = ICONS[min(hidden.states)]
        return Text(f"{plain if self.ascii_only else icon}{GAP}{hidden.count} more {hidden.what}", style=style, end="")


def bar(share: float, width: int, ascii_only: bool = False) -> Text:
    """Return a bar of which a share is filled."""
    from rich.text import Text

    filled = round(min(1.0, max(0.0, share)) * width)
    full, empty = ("#", "-") if ascii_only else ("━", "─")
    return Text(full * filled, style="cyan").append(empty * (width - filled), style="dim")


def _elapsed(row: StageRow, now: float) -> str:
    is_live = row.view.state in LIVING and row.started is not None
    return duration(now - row.started) if is_live and row.started is not None else ""


# -- the run as a whole ------------------------------------------------------------------------------------------------


def overall_line(snapshot: Snapshot, width: int, ascii_only: bool = False) -> Text:
    """Return the line of the whole run: a bar, the finished stages, the time passed and the time left."""
    from rich.text import Text

    rows = [row for row in snapshot.rows if row.view.state is not StageState.SKIPPED]
    finished = sum(row.view.state in FINISHED for row in rows)
    passed = None if snapshot.started is None else max(0.0, snapshot.now - snapshot.started)
    left, complete = time_left(rows, snapshot.now)
    parts = [Part(f"{finished} of {len(rows)} stages done", AMOUNT)]
    if passed is not None:
        parts.append(Part(f"{duration(passed)} so far", REST))
    if left and finished < len(rows):
        parts.append(Part(f"{'~' if complete else 'more than '}{duration(left)} left", LEFT))
    share = finished / max(1, len(rows))
    if complete and passed is not None and passed + left > 0:
        share = passed / (passed + left)
    used = min(BAR_WIDTH, max(0, width // 4))
    line = Text(end="", no_wrap=True).append_text(bar(share, used, ascii_only))
    return line.append(GAP + fit(parts, max(1, width - used - len(GAP))))


def time_left(rows: Iterable[StageRow], now: float) -> tuple[float, bool]:
    """Return the time that the unfinished stages need one after the other, and whether all of theirs is known."""
    total, complete = 0.0, True
    for row in rows:
        if row.view.state in FINISHED | ENDED:
            continue
        left = max(0.0, row.eta - now) if row.eta is not None and _is_training(row) else expected_left(row, now)
        total += left or 0.0
        complete = complete and left is not None
    return total, complete


def _is_training(row: StageRow) -> bool:
    """Whether the pace is that of the stage; that of another activity leaves out those after it."""
    return row.progress is not None and row.progress.unit == STEPS
