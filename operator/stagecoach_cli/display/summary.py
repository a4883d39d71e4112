"""Printed at the end of a run: tables of stages and metrics, samples of the released model, and failures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stagecoach_api.artifacts import REPORT, Manifest, output_prefix
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.stage_kind import StageKind
from stagecoach_api.status import FINISHED
from stagecoach_api.store import Store, StoreError
from stagecoach_api.summary_tables import ChangeTable, MetricTable
from stagecoach_cli.display.live import causes
from stagecoach_cli.display.numbers import duration, metric, quantity, short
from stagecoach_core.snapshot import Snapshot, StageRow
from stagecoach_core.values import StageState
from stagecoach_local.tail import last_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FAILURE_LINES = 15


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
    """Return a table of every stage's kind, time, training tokens and artifact."""
    table = empty_table("Stage", "Kind", ">Time", ">Tokens", "Artifact")
    for row in rows:
        manifest = manifests.get(row.view.digest or "") if row.view.state in FINISHED else None
        tokens = quantity(manifest.tokens) if manifest is not None and manifest.tokens else ""
        artifact = short(row.view.digest or "") if manifest is not None else ""
        table.add_row(row.name, row.kind, _time(row), tokens, artifact)
    return table


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
    """Print the tables and samples of a run's finished stages, and where their artifacts are."""
    finished = {
        row.name: manifests[row.view.digest or ""]
        for row in snapshot.rows
        if row.view.state in FINISHED and row.view.digest in manifests
    }
    print_titled(console, "Stages", stage_table(snapshot.rows, manifests))
    for title, table in measured_tables(finished):
        print_titled(console, title, table)
    releases = {name: item for name, item in finished.items() if item.kind in STAGE_KINDS and _kind(item).release}
    for name, manifest in releases.items():
        _print_samples(console, name, samples(store, manifest))
    root = f"{store.uri.rstrip('/')}/artifacts"
    console.print(f"Artifacts: {root}/<digest>/output", highlight=False, markup=False, soft_wrap=True)
    for name, manifest in releases.items():
        uri = f"{store.uri.rstrip('/')}/{output_prefix(manifest.stage_digest)}"
        console.print(f"Output of {name}: {uri}", highlight=False, markup=False, soft_wrap=True)


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


def samples(store: Store, manifest: Manifest) -> list[tuple[str, str]]:
    """Return the prompts and answers in a stage's report; empty if it has no report with samples."""
    if REPORT not in {item.path for item in manifest.objects}:
        return []
    try:
        report = json.loads(store.read(f"{output_prefix(manifest.stage_digest)}/{REPORT}"))
    except (StoreError, ValueError):
        return []
    found = report.get("samples") if isinstance(report, dict) else None
    return [
        (str(item.get("prompt", "")), str(item.get("answer", "")))
        for item in (found if isinstance(found, list) else [])
        if isinstance(item, dict)
    ]


def _print_samples(console: Console, stage: str, answers: list[tuple[str, str]]) -> None:
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
