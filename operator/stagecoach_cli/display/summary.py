"""Printed at the end of a run: tables of stages and metrics, samples of the released model, and failures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagecoach_api.artifacts import REPORT, Manifest, output_prefix
from stagecoach_api.kinds import TRAINING_KINDS
from stagecoach_api.status import FINISHED
from stagecoach_api.store import Store, StoreError
from stagecoach_cli.display.live import causes
from stagecoach_cli.display.numbers import duration, metric, quantity, short
from stagecoach_core.snapshot import Snapshot, StageRow
from stagecoach_core.values import StageState
from stagecoach_local.tail import last_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FAILURE_LINES = 15

REWARDS = ("reward", "kl", "endedShare", "answerTokens")
"""Metrics of a PPO stage that are shown."""

_TOKENS_PER_CHARACTER = re.compile(r"^tokensPerCharacter\.(?P<set>.+)\.(?P<when>before|after)$")
_HELD_OUT = re.compile(r"^heldOut\.(?P<set>.+?)(?P<before>\.before)?\.(?P<figure>[A-Za-z]+)$")


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


def tokens_per_character(metrics: Mapping[str, float]) -> dict[str, BeforeAfter]:
    """Return tokens per character before and after a tokenizer stage, by set."""
    changes: dict[str, BeforeAfter] = {}
    for name, value in metrics.items():
        found = _TOKENS_PER_CHARACTER.match(name)
        if found:
            other = changes.get(found["set"], BeforeAfter())
            is_before = found["when"] == "before"
            changes[found["set"]] = BeforeAfter(value, other.after) if is_before else BeforeAfter(other.before, value)
    return changes


def bits_per_character(metrics: Mapping[str, float]) -> dict[str, BeforeAfter]:
    """Return held-out bits per character before and after a training stage, by set."""
    return _held_out(metrics, "bitsPerCharacter")


def accuracy(metrics: Mapping[str, float]) -> dict[str, BeforeAfter]:
    """Return the accuracy on held-out preferences before and after a training stage, by set."""
    return _held_out(metrics, "accuracy")


def _held_out(metrics: Mapping[str, float], figure: str) -> dict[str, BeforeAfter]:
    changes: dict[str, BeforeAfter] = {}
    for name, value in metrics.items():
        found = _HELD_OUT.match(name)
        if found is None or found["figure"] != figure:
            continue
        other = changes.get(found["set"], BeforeAfter())
        changes[found["set"]] = BeforeAfter(value, other.after) if found["before"] else BeforeAfter(other.before, value)
    return changes


def rewards_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the shown metrics of a PPO stage's last update."""
    return {name: metrics[name] for name in REWARDS if name in metrics}


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


def change_table(changes: Mapping[str, Mapping[str, BeforeAfter]]) -> Table | None:
    """Return a table with a row for each stage and a column for each set; None if nothing was measured."""
    sets = list(dict.fromkeys(name for by_set in changes.values() for name in by_set))
    if not sets:
        return None
    table = empty_table("Stage", *(f">{name}" for name in sets))
    for stage, by_set in changes.items():
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
    of_kind = {kind: {name: item for name, item in finished.items() if item.kind == kind} for kind in _kinds(finished)}
    training = {name: item for name, item in finished.items() if item.kind in TRAINING_KINDS}
    vocabularies = {name: tokens_per_character(item.metrics) for name, item in of_kind.get("tokenizer", {}).items()}
    held_out = {name: bits_per_character(item.metrics) for name, item in training.items()}
    preferences = {name: accuracy(item.metrics) for name, item in training.items()}
    rewards = {name: rewards_of(item.metrics) for name, item in of_kind.get("ppo", {}).items()}
    tables = {
        "Stages": stage_table(snapshot.rows, manifests),
        "Tokens per character, before and after the vocabulary": change_table(vocabularies),
        "Held-out bits per character, before and after training": change_table(held_out),
        "Held-out preference accuracy, before and after training": change_table(preferences),
        "Reinforcement learning, last update": metrics_table(rewards),
        "Evaluation": metrics_table({name: item.metrics for name, item in of_kind.get("evaluate", {}).items()}),
    }
    for title, table in tables.items():
        if table is not None:
            print_titled(console, title, table)
    for name, manifest in of_kind.get("export", {}).items():
        _print_samples(console, name, samples(store, manifest))
    root = f"{store.uri.rstrip('/')}/artifacts"
    console.print(f"Artifacts: {root}/<digest>/output", highlight=False, markup=False, soft_wrap=True)
    for name, manifest in of_kind.get("export", {}).items():
        uri = f"{store.uri.rstrip('/')}/{output_prefix(manifest.stage_digest)}"
        console.print(f"Output of {name}: {uri}", highlight=False, markup=False, soft_wrap=True)


def _kinds(manifests: Mapping[str, Manifest]) -> list[str]:
    return sorted({manifest.kind for manifest in manifests.values()})


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
