"""Reports of training stages: `report.json` for programs, `report.md` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stagecoach_api.artifacts import REPORT, REPORT_TEXT
from stagecoach_trainer.runtime.context import StageContext


def write_report(context: StageContext, report: Mapping[str, Any], text: str) -> None:
    """Write `report` as JSON and `text` as Markdown to the output, with the warnings that arose meanwhile."""
    known = list(report.get("warnings", ()))
    new = [warning for warning in context.progress.warnings if warning not in known]
    report = {**report, "warnings": [*known, *new]}
    text += "".join(f"\nWarning: {warning}\n" for warning in new)
    written = json.dumps(report, indent=2, ensure_ascii=False, sort_keys=True)
    (context.output / REPORT).write_text(written + "\n", encoding="utf-8")
    (context.output / REPORT_TEXT).write_text(text, encoding="utf-8")


def training_text(kind: str, report: Mapping[str, Any], columns: Sequence[str], more: Sequence[str] = ()) -> str:
    """Return a training stage's report in Markdown.

    Args:
        kind: The stage's kind.
        report: The result of `make_report`, possibly with more fields.
        columns: Counts to show of each data set.
        more: Lines to insert between the data sets and the metrics.
    """
    lines = [
        f"# {kind}",
        "",
        f"{report['tokens']:,} tokens in {report['steps']:,} steps; {trained_parameters(report)}.",
        "",
        *table("data set", columns, report["data"]),
        *more,
        "",
        "| metric | value |",
        "|---|---:|",
        *(f"| {name} | {value:.4f} |" for name, value in report["metrics"].items()),
        "",
        *(f"Warning: {warning}" for warning in report["warnings"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def trained_parameters(report: Mapping[str, Any]) -> str:
    """Return a sentence on how many parameters were trained, and which."""
    parameters = report["parameters"]
    share = parameters["trained"] / max(1, parameters["all"])
    return (
        f"{parameters['trained']:,} of {parameters['all']:,} parameters ({share:.2%}) were trained: "
        f"{'; '.join(report['trained'])}"
    )


def table(what: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a Markdown table with one row per name; integers unrounded, other numbers with four decimals."""
    lines = [f"| {what} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(column, 0)) for column in columns) + " |")
    return lines


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
