"""The funnel: for every source, the records read, kept and dropped by reason, with a check that none is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagecoach_api.references import Format
from stagecoach_trainer.data.notes import Notes, one_class_warnings, warnings_of
from stagecoach_trainer.data.reading import Malformed, proposal
from stagecoach_trainer.data.steps import StepCounter

MAX_LISTED = 20
"""Malformed records that a report lists, at most."""

MAX_REASONS = 4
"""Reasons that a message gives, at most."""

MAX_COUNTED = 100
"""Distinct reasons that are counted, at most."""


@dataclass
class Funnel:
    """Record counts of one source."""

    read: int = 0
    """Records read, malformed ones included."""

    malformed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By `step.reason`; `weight` counts those that a source weight below 1 leaves out."""

    train: int = 0
    """Distinct training records; `copies` counts each as often as it is written."""

    copies: int = 0
    held_out: int = 0
    characters: int = 0
    """Characters of `train` and `held_out`, each record once."""

    notes: Notes = field(default_factory=Counter)
    """What is not read, or may not be meant."""

    @property
    def kept(self) -> int:
        return self.train + self.held_out

    def check(self, label: str) -> None:
        """Raise RuntimeError unless in = out + dropped. A lost record is a bug here, not a fault of the data."""
        accounted = self.malformed + self.dropped.total() + self.kept
        if self.read != accounted:
            raise RuntimeError(f"funnel of {label}: {self.read} records read, {accounted} accounted for")

    def as_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "malformed": self.malformed,
            "dropped": dict(sorted(self.dropped.items())),
            "train": self.train,
            "trainWritten": self.copies,
            "heldOut": self.held_out,
            "characters": self.characters,
            **({"notes": dict(sorted(self.notes.items()))} if self.notes else {}),
        }


def total(funnels: Iterable[Funnel]) -> Funnel:
    """Return the sum of all sources."""
    result = Funnel()
    for funnel in funnels:
        result.read += funnel.read
        result.malformed += funnel.malformed
        result.dropped += funnel.dropped
        result.train += funnel.train
        result.copies += funnel.copies
        result.held_out += funnel.held_out
        result.characters += funnel.characters
        result.notes += funnel.notes
    return result


def report_json(
    funnels: dict[str, Funnel], pipeline: Sequence[StepCounter], malformed: Sequence[Malformed]
) -> dict[str, Any]:
    """Return `report.json`: the funnel in total and per source, each step's counters, malformed records, warnings."""
    warnings = [text for label, funnel in funnels.items() for text in warnings_of(funnel.notes, label)]
    warnings += one_class_warnings([funnel.notes for funnel in funnels.values()])
    return {
        "total": total(funnels.values()).as_json(),
        "sources": {label: funnel.as_json() for label, funnel in funnels.items()},
        "steps": [
            {
                "step": step.label,
                "seen": step.seen,
                "changed": step.changed,
                "dropped": dict(sorted(step.dropped.items())),
            }
            for step in pipeline
        ],
        "malformed": [{"where": item.where, "reason": item.reason} for item in malformed],
        **({"warnings": warnings} if warnings else {}),
    }


def describe_malformed(
    malformed: Sequence[Malformed], reasons: Mapping[str, int], formats: Mapping[str, Format]
) -> str:
    """Return a sentence for each reason why records are malformed, and what to do if they fit another layout.

    Args:
        malformed: The first malformed records.
        reasons: Number of records by reason.
        formats: Layout of each source by its label.
    """
    first = {item.reason: item.where for item in reversed(malformed)}
    most = sorted(reasons, key=lambda reason: -reasons[reason])[:MAX_REASONS]
    named = [
        f"{first[reason]}{f' and {reasons[reason] - 1:,} more' if reasons[reason] > 1 else ''}: {reason}"
        for reason in most
        if reason in first
    ]
    other = len(reasons) - len(named)
    more = [f"and {other:,} other reasons"] if other else []
    advice = {proposal(item.looks_like, formats.get(item.source, Format.AUTO)): None for item in malformed}
    return "; ".join([*named, *more, *[text for text in advice if text][:1]])


def report_markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    sources = report["sources"]
    columns = {**sources, "total": report["total"]} if len(sources) > 1 else sources
    reasons = sorted({reason for funnel in columns.values() for reason in funnel["dropped"]})
    rows = [
        ("read", [funnel["read"] for funnel in columns.values()]),
        ("− malformed", [funnel["malformed"] for funnel in columns.values()]),
        *((f"− {reason}", [funnel["dropped"].get(reason, 0) for funnel in columns.values()]) for reason in reasons),
        ("= held out", [funnel["heldOut"] for funnel in columns.values()]),
        ("+ train", [funnel["train"] for funnel in columns.values()]),
        ("train, with repeats", [funnel["trainWritten"] for funnel in columns.values()]),
        ("characters kept", [funnel["characters"] for funnel in columns.values()]),
    ]
    lines = ["# Data", "", f"| records | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |" for name, counts in rows]
    changed = [f"{step['step']} changed {step['changed']:,} records" for step in report["steps"] if step["changed"]]
    if changed:
        lines += ["", "; ".join(changed) + "."]
    if report["malformed"]:
        lines += ["", "## Malformed", "", *(f"- `{item['where']}`: {item['reason']}" for item in report["malformed"])]
        unlisted = report["total"]["malformed"] - len(report["malformed"])
        lines += [f"- and {unlisted:,} more"] if unlisted else []
    for warning in report.get("warnings", ()):
        lines += ["", f"Warning: {warning}"]
    return "\n".join(lines) + "\n"
