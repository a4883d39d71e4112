"""Tables in which a run's summary shows what its stages measured. A kind declares the tables of its stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricTable:
    """One row for each metric of a stage."""

    title: str
    metrics: tuple[str, ...] = ()
    """Names of the metrics shown; empty shows all."""


@dataclass(frozen=True)
class ChangeTable:
    """One row for each stage, one column for each data set: a figure before and after the stage."""

    title: str
    before: str
    """Name of the metric before, with `{set}` for the name of the data set."""
    after: str


SummaryTable = MetricTable | ChangeTable

HELD_OUT_TABLES = (
    ChangeTable(
        "Held-out bits per character, before and after training",
        before="heldOut.{set}.before.bitsPerCharacter",
        after="heldOut.{set}.bitsPerCharacter",
    ),
    ChangeTable(
        "Held-out preference accuracy, before and after training",
        before="heldOut.{set}.before.accuracy",
        after="heldOut.{set}.accuracy",
    ),
)
"""Tables of every kind that trains and measures held-out sets."""
