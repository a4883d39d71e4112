"""Packed against padded SFT, in useful tokens per second, on samples of very different lengths; how full rows are."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.measuring import Figure, Goal, alternate, compared, difference
from bench.ours import train_ours
from bench.peer import train_peer
from bench.workload import Batch, Run, belle_like, lognormal_lengths, make_model, row_of, useful_tokens
from stagecoach_trainer.batches.packing import pack
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.samples.rows import pack_rows

LONGEST = 512
SAMPLES = 64
"""Samples of one optimiser step on each side."""
MICRO_BATCH = 8
"""Rows that each side computes at a time."""
STEPS = 3
PLANNED = 100_000
"""Samples packed to measure how full rows are."""


def figures() -> list[Figure]:
    """Measure packing against padding to the maximum length and to the longest sample of each micro-batch."""
    batches = belle_like(STEPS, SAMPLES, LONGEST)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        to_maximum = alternate(
            lambda number: _ours(batches, folder / f"a-{number}"),
            lambda number: _peer(batches, folder / f"b-{number}", LONGEST),
        )
        dynamic = alternate(
            lambda number: _ours(batches, folder / f"c-{number}"),
            lambda number: _peer(batches, folder / f"d-{number}", None),
        )
    return [
        _speeds("SFT packed against padding to the maximum", batches, to_maximum, Goal("≥", 3.0)),
        _speeds("SFT packed against dynamic padding", batches, dynamic, Goal("≥", 2.0)),
        difference("SFT packed, loss in bf16", dynamic[0][0].losses, dynamic[0][1].losses, Goal("≤", 1e-3)),
        _fullness(),
    ]


def _ours(batches: Sequence[Batch], folder: Path) -> Run:
    return train_ours(make_model(), [packed(batch) for batch in batches], folder, True, MICRO_BATCH, LONGEST)


def _peer(batches: Sequence[Batch], folder: Path, pad_to: int | None) -> Run:
    return train_peer(make_model(), batches, folder, True, MICRO_BATCH, pad_to)


def packed(batch: Batch) -> list[Row]:
    """Return the samples of a batch in packed rows."""
    return pack_rows([row_of(sample) for sample in batch], LONGEST)


def _speeds(name: str, batches: Sequence[Batch], pairs: Sequence[tuple[Run, Run]], goal: Goal) -> Figure:
    return compared(name, "useful tokens/s", [(_speed(batches, a), _speed(batches, b)) for a, b in pairs], goal)


def _speed(batches: Sequence[Batch], run: Run) -> float:
    """Return the useful tokens per second over the timed steps, which are the last ones."""
    timed = batches[len(batches) - len(run.step_seconds) :]
    return sum(map(useful_tokens, timed)) / sum(run.step_seconds)


def _fullness() -> Figure:
    """Return the share of useful tokens in packed rows; the least possible number of rows also meets the goal."""
    lengths = lognormal_lengths(np.random.default_rng(1), PLANNED, 2048)
    rows = len(pack(lengths, 2048))
    share = float(lengths.sum()) / (rows * 2048)
    least = math.ceil(lengths.sum() / 2048)
    goal = Goal("≥", 0.999)
    met = goal.met_by(share) or rows == least
    name = f"packing {PLANNED:,} samples into rows of 2,048"
    return Figure(name, "share of useful tokens", share, None, None, str(goal), met)
