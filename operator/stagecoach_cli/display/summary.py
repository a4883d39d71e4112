"""Printed at the end of a run: tables of stages and metrics, samples of the released model, and failures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stagecoach_api.artifacts import REPORT, Manifest, uri_below
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.stage_kind import StageKind
from stagecoach_api.status import FINISHED
from stagecoach_api.store import Store
from stagecoach_api.summary_tables import ChangeTable, MetricTable
from stagecoach_cli.display.numbers import HOUR, duration, metric, quantity, short
from stagecoach_cli.display.reports import StageReport, read_report_file, read_reports
from stagecoach_cli.display.rows import causes, render_lines
from stagecoach_core.snapshot import Snapshot, StageRow
from stagecoach_core.values import StageState
from stagecoach_local.tail import last_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FAILURE_LINES = 15
FEW_SAMPLES = 3
"""Samples shown of a stage whose artifact is not for use outside the run; its report has all of them."""


@dataclass(frozen=True)
class BeforeAfter:
    """A metric before and after a stage, each None if it was not measured."""

    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        before, after = (None if value is None else f"{value:.3f}" for value in (self.before, self.after))
        if before is None or after is None:
            return before or after or ""
        return f"{before} → {after}"


def changes(metrics: Mapping[str, float], table: ChangeTable) -> dict[str, BeforeAfter]:
    """Return the table's figure before and after a stage, by data set."""
    before, after = (_pattern(template) for template in (table.before, table.after))
    found: dict[str, BeforeAfter] = {}
    for name, value in metrics.items():
        if match := before.match(name):
            found[match["set"]] = replace(found.get(match["set"], BeforeAfter()), before=value)
        elif match := after.match(name):
            found[match["set"]] = replace(found.get(match["set"], BeforeAfter()), after=value)
    return found


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("^" + re.escape(template).replace(re.escape("{set}"), "(?P<set>.+)") + "$")


def shown(metrics: Mapping[str, float], table: MetricTable) -> dict[str, float]:
    """Return the metrics that the table shows."""
    return {name: metrics[name] for name in table.metrics or metrics if name in metrics}


# -- tables ------------------------------------------------------------------------------------------------------------


def stage_table(rows: Iterable[StageRow], manifests: Mapping[str, Manifest]) -> Table:
    """Return a table of every stage's kind, time, training tokens and artifact, and what was unusual about it."""
    found = list(rows)
    notes = {row.name: ", ".join(_notes(row)) for row in found}
    table = empty_table("Stage", "Kind", ">Time", ">Tokens", "Artifact", *(["Notes"] if any(notes.values()) else []))
    for row in found:
        manifest = manifests.get(row.view.digest or "") if row.view.state in FINISHED else None
        tokens = quantity(manifest.tokens) if manifest is not None and manifest.tokens else ""
        artifact = short(row.view.digest or "") if manifest is not None else ""
        last = [notes[row.name]] if any(notes.values()) else []
        table.add_row(row.name, row.kind, _time(row), tokens, artifact, *last)
    for column in table.columns[: -1 if any(notes.values()) else None]:
        column.no_wrap = True  # where columns are few, the notes wrap
    return table


def _notes(row: StageRow) -> Iterator[str]:
    if row.resumed_from is not None:
        yield f"resumed from step {row.resumed_from:,}"
    if (why := causes(row)) and row.view.state in FINISHED:  # a failed stage's causes are printed with its message
        yield f"restarted: {why}"


def _time(row: StageRow) -> str:
    if row.view.state is StageState.SUCCEEDED and row.seconds is not None:
        return duration(row.seconds)
    if row.view.state is StageState.CACHED and row.seconds is not None:
        return f"cached ({duration(row.seconds)})"
    return row.view.state.value.lower()


def change_table(by_stage: Mapping[str, Mapping[str, BeforeAfter]]) -> Table | None:
    """Return a table with a row for each stage and a column for each set; None if nothing was measured."""
    sets = list(dict.fromkeys(name for by_set in by_stage.values() for name in by_set))
    if not sets:
        return None
    table = empty_table("Stage", *(f">{name}" for name in sets))
    for stage, by_set in by_stage.items():
        if by_set:
            table.add_row(stage, *(str(by_set.get(name, "")) for name in sets))
    return table


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Return a table with a row for each metric of each stage; None if there is none."""
    if not any(metrics.values()):
        return None
    table = empty_table("Stage", "Metric", ">Value")
    for stage, figures in metrics.items():
        for index, (name, value) in enumerate(sorted(figures.items())):
            table.add_row(stage if index == 0 else "", name, metric(value))
    return table


def empty_table(*columns: str) -> Table:
    """Return a table without rows; a column whose name starts with `>` is right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def print_titled(console: Console, title: str, table: Table) -> None:
    """Print a title, a table and an empty line."""
    from rich.text import Text

    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    console.print()


# -- summary -----------------------------------------------------------------------------------------------------------


def print_summary(console: Console, snapshot: Snapshot, manifests: Mapping[str, Manifest], store: Store) -> None:
    """Print what a run's finished stages made: tables, gates, samples, warnings, and where the artifacts are."""
    finished = {
        row.name: manifests[row.view.digest or ""]
        for row in snapshot.rows
        if row.view.state in FINISHED and row.view.digest in manifests
    }
    reports = read_reports(store, finished) | reports_of_failed(snapshot)
    print_titled(console, "Stages", stage_table(snapshot.rows, manifests))
    for title, table in measured_tables(finished):
        print_titled(console, title, table)
    print_gates(console, reports)
    releases = {name: item for name, item in finished.items() if item.kind in STAGE_KINDS and _kind(item).release}
    for name, report in reports.items():
        _print_samples(console, name, report.samples[: None if name in releases else FEW_SAMPLES])
    print_warnings(console, reports)
    root = f"{store.uri.rstrip('/')}/artifacts"
    console.print(f"Artifacts: {root}/<digest>", highlight=False, markup=False, soft_wrap=True)
    for name, manifest in releases.items():
        uri = uri_below(store.uri, manifest.folder)
        console.print(f"Output of {name}: {uri}", highlight=False, markup=False, soft_wrap=True)


def print_stages(console: Console, snapshot: Snapshot) -> None:
    """Print a line for each stage."""
    width = console.width - 1 if console.is_terminal else console.width
    for line in render_lines(snapshot, width, console.options.ascii_only):
        console.print(line, soft_wrap=True, end="\n")


def reports_of_failed(snapshot: Snapshot) -> dict[str, StageReport]:
    """Return the reports that failed stages have left: those whose gate was missed."""
    return {
        row.name: read_report_file(row.log.parent / "logs" / REPORT)
        for row in snapshot.rows
        if row.view.state is StageState.FAILED and row.log is not None
    }


def print_gates(console: Console, reports: Mapping[str, StageReport]) -> None:
    """Print the gates of all stages: the value measured, the bound, and the verdict."""
    table = empty_table("Stage", "Metric", ">Value", "Bound", "Verdict")
    for name, report in reports.items():
        for gate in report.gates:
            value = "NaN" if gate.value is None else metric(gate.value)
            table.add_row(name, gate.metric, value, gate.limits, gate.verdict)
    if table.row_count:
        print_titled(console, "Gates", table)


def print_warnings(console: Console, reports: Mapping[str, StageReport]) -> None:
    """Print the warnings of all stages, those from the cache too."""
    from rich.text import Text

    lines = [f"{name}: {warning}" for name, report in reports.items() for warning in report.warnings]
    if lines:
        console.print(Text("Warnings", style="bold yellow"))
    for line in lines:
        console.print(Text(f"  {_indented(line, '  ')}", style="yellow"), soft_wrap=True)
    if lines:
        console.print()


def completion(snapshot: Snapshot, manifests: Mapping[str, Manifest]) -> str:
    """Return the line that ends a complete run: stages, time, tokens and GPU-hours of what was done now."""
    rows = [row for row in snapshot.rows if row.view.state in FINISHED]
    cached = sum(row.view.state is StageState.CACHED for row in rows)
    made = [
        manifests[row.view.digest or ""]
        for row in rows
        if row.view.state is StageState.SUCCEEDED and row.view.digest in manifests
    ]
    count = f"{len(rows)} stage{'s' * (len(rows) != 1)} done"
    if len(rows) < len(snapshot.rows):
        count = f"{len(rows)} of {len(snapshot.rows)} stages done"
    time = "" if snapshot.started is None else f" in {duration(snapshot.now - snapshot.started)}"
    parts = [f"{count}, {cached} from the cache,{time}".removesuffix(",") if cached else f"{count}{time}"]
    tokens, gpu_seconds = sum(item.tokens for item in made), sum(item.gpu_seconds for item in made)
    parts += [f"{quantity(tokens)} training tokens"] if tokens else []
    parts += [f"{gpu_seconds / HOUR:.3g} GPU-hours"] if gpu_seconds else []
    return f"run `{snapshot.run}` is complete: {', '.join(parts)}"


def next_command(snapshot: Snapshot) -> str:
    """Return a hint on how to get at the result: the released model, or else the last artifact."""
    finished = [row for row in snapshot.rows if row.view.state in FINISHED]
    if not finished:
        return ""
    releases = [row for row in finished if row.kind in STAGE_KINDS and STAGE_KINDS[row.kind].release]
    name = (releases or finished)[-1].name
    return f"copy {name} with `stagecoach artifacts get {snapshot.run}/{name} FOLDER`"


def measured_tables(manifests: Mapping[str, Manifest]) -> list[tuple[str, Table]]:
    """Return the tables that the kinds of finished stages declare, with titles, except those without a figure."""
    tables: list[tuple[str, Table]] = []
    for declared in dict.fromkeys(table for kind in STAGE_KINDS.values() for table in kind.tables):
        metrics = {
            name: item.metrics
            for name, item in manifests.items()
            if item.kind in STAGE_KINDS and declared in _kind(item).tables
        }
        if isinstance(declared, ChangeTable):
            table = change_table({name: changes(figures, declared) for name, figures in metrics.items()})
        else:
            table = metrics_table({name: shown(figures, declared) for name, figures in metrics.items()})
        if table is not None:
            tables.append((declared.title, table))
    return tables


def _kind(manifest: Manifest) -> StageKind:
    return STAGE_KINDS[manifest.kind]


def _print_samples(console: Console, stage: str, answers: Sequence[tuple[str, str]]) -> None:
    from rich.text import Text

    if answers:
        console.print(Text(f"Answers of {stage}", style="bold"))
    for prompt, answer in answers:
        console.print(Text(f"\n  > {_indented(prompt, '    ')}", style="dim"), soft_wrap=True)
        console.print(Text(f"    {_indented(answer, '    ') or '(empty)'}"), soft_wrap=True)
    if answers:
        console.print()


def _indented(text: str, indent: str) -> str:
    return text.strip().replace("\n", f"\n{indent}")


# -- failures ----------------------------------------------------------------------------------------------------------


def print_failures(console: Console, snapshot: Snapshot) -> None:
    """Print the cause, message, log file and last log lines of every failed stage."""
    from rich.text import Text

    for row in snapshot.rows:
        if row.view.state is not StageState.FAILED:
            continue
        why = causes(row)
        console.print(Text(f"\n{row.name} failed" + (f" ({why})" if why else ""), style="bold red"))
        console.print(Text(f"  {_indented(row.view.message, '  ')}"), soft_wrap=True)
        if row.log is None:
            continue
        console.print(Text(f"  log: {row.log}", style="dim"), soft_wrap=True)
        for line in last_lines(row.log, FAILURE_LINES):
            console.print(Text(f"  | {line}", style="dim"), soft_wrap=True)
