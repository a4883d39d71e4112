"""Tokens per second of both training loops, whether their losses are equal, and how long ours waits for data."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from bench.measuring import Figure, Goal, alone, alternate, compared, difference
from bench.ours import logged, train_ours
from bench.peer import train_peer
from bench.workload import ROWS, TOKENS, Batch, Run, full_rows, make_model, row_of

STEPS = 12
"""Optimiser steps of a run; the first one is a warm-up and is not timed."""
FP32_STEPS = 6
ROUNDS = 7
"""More than elsewhere: a run takes seconds, so a short disturbance affects only one side."""
HALF = 0.5


def figures() -> list[Figure]:
    """Measure pre-training and SFT."""
    with tempfile.TemporaryDirectory() as folder:
        found = _workload("pre-training", 0.0, Goal("≥", 1.4), Path(folder) / "pretrain")
        found += _workload("SFT, half masked", HALF, Goal("≥", 1.9), Path(folder) / "sft")
    return found


def _workload(name: str, masked_share: float, goal: Goal, folder: Path) -> list[Figure]:
    batches = full_rows(STEPS, masked_share)
    pairs = alternate(
        lambda number: _ours(batches, folder / f"ours-{number}", bf16=True),
        lambda number: _peer(batches, folder / f"peer-{number}", bf16=True),
        ROUNDS,
    )
    exact = full_rows(FP32_STEPS, masked_share)
    ours, peer = _ours(exact, folder / "ours-fp32", bf16=False), _peer(exact, folder / "peer-fp32", bf16=False)
    waits = [_wait_share(folder / f"ours-{number}") for number in range(ROUNDS)]
    return [
        compared(f"{name}, bf16", "tokens/s", [(speed(a), speed(b)) for a, b in pairs], goal),
        difference(f"{name}, loss in bf16", pairs[0][0].losses, pairs[0][1].losses, Goal("≤", 1e-3)),
        difference(f"{name}, loss in fp32", ours.losses, peer.losses, Goal("≤", 1e-5)),
        alone(f"{name}, waiting for data", "share of step time", waits, Goal("<", 0.01)),
    ]


def train_side(ours: bool, batches: list[Batch], folder: Path) -> Run:
    """Train one side in bf16, as `figures` does."""
    return _ours(batches, folder, bf16=True) if ours else _peer(batches, folder, bf16=True)


def _ours(batches: list[Batch], folder: Path, bf16: bool) -> Run:
    rows = [[row_of(sample) for sample in batch] for batch in batches]
    return train_ours(make_model(), rows, folder, bf16, micro_batch=ROWS)


def _peer(batches: list[Batch], folder: Path, bf16: bool) -> Run:
    return train_peer(make_model(), batches, folder, bf16, micro_batch=ROWS)


def speed(run: Run) -> float:
    """Return the tokens per second of the median step."""
    return ROWS * TOKENS / statistics.median(run.step_seconds)


def _wait_share(folder: Path) -> float:
    steps = [entry for entry in logged(folder) if "dataWaitShare" in entry]  # the others are held-out evaluations
    return float(statistics.mean(entry["dataWaitShare"] for entry in steps[1:]))
