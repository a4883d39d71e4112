"""Peak memory of training: the same few steps with our loop and with the Trainer, each in its own process."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bench.measuring import Figure, Goal, alternate, compared, num_threads, peak_bytes, run_child
from bench.workload import ROWS, full_rows, make_model, row_of

STEPS = 3
MEBIBYTE = 2**20


def figures() -> list[Figure]:
    """Measure both sides alternately."""
    pairs = alternate(lambda number: _peak("ours"), lambda number: _peak("peer"))
    return [compared("peak memory, pre-training, bf16", "MiB", pairs, Goal("≤", 1.0))]


def _peak(side: str) -> float:
    return float(run_child(["-m", "bench.memory", side]).report["peakBytes"]) / MEBIBYTE


def main(side: str) -> None:
    """Train and print the peak memory."""
    if side == "peer":
        sys.modules["deepspeed"] = None  # type: ignore[assignment]  # else accelerate imports it, which costs memory
    import torch

    torch.set_num_threads(num_threads())
    batches = full_rows(STEPS, masked_share=0.0)
    with tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            from bench.ours import train_ours

            rows = [[row_of(sample) for sample in batch] for batch in batches]
            train_ours(make_model(), rows, Path(folder) / "run", bf16=True, micro_batch=ROWS)
        else:
            from bench.peer import train_peer

            train_peer(make_model(), batches, Path(folder), bf16=True, micro_batch=ROWS)
    print(json.dumps({"peakBytes": peak_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1])
