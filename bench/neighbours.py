"""Tokens per second next to neighbours: a process per core that keeps it busy, as on a shared machine.

Each side is a process of its own: ours with the threads that the launcher gives a rank, the Trainer as `python` starts
it, both with the same number of threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.measuring import Figure, Goal, alternate, compared, num_threads, run_child
from bench.workload import full_rows
from stagecoach_trainer.runtime.threads import thread_environment

STEPS = 8
"""Optimiser steps of a run; the first one is a warm-up and is not timed."""
WORKLOADS = {"pre-training": 0.0, "SFT, half masked": 0.5}
"""Share of the tokens that carry no loss."""
OURS, PEER = "ours", "peer"

# Ends with the bench, however that ends: its standard input is a pipe of the bench.
BUSY = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    sum(range(10000))
"""


def figures() -> list[Figure]:
    """Measure both workloads on both sides."""
    with tempfile.TemporaryDirectory() as folder, busy_neighbours(num_threads()):
        return [_workload(name, Path(folder) / str(index)) for index, name in enumerate(WORKLOADS)]


def _workload(name: str, folder: Path) -> Figure:
    pairs = alternate(
        lambda number: measured(OURS, name, folder / f"ours-{number}"),
        lambda number: measured(PEER, name, folder / f"peer-{number}"),
    )
    return compared(f"{name}, bf16, next to one busy process per core", "tokens/s", pairs, Goal("≥", 1.0))


def measured(side: str, workload: str, folder: Path, steps: int = STEPS) -> float:
    """Return the tokens per second of one side in a process of its own."""
    variables: Mapping[str, str] = thread_environment({}, 1) if side == OURS else {}
    child = run_child(["-m", "bench.neighbours", side, workload, str(folder), str(steps)], variables)
    return float(child.report["tokensPerSecond"])


@contextmanager
def busy_neighbours(number: int) -> Iterator[list[int]]:
    """Keep this many cores busy in the block; yields the process ids."""
    neighbours = [subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE) for _ in range(number)]
    try:
        yield [neighbour.pid for neighbour in neighbours]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
        for neighbour in neighbours:
            neighbour.communicate()


def main() -> None:
    """Run one side; print its tokens per second."""
    from bench.throughput import speed, train_side

    side, workload, folder, steps = sys.argv[1:]
    run = train_side(side == OURS, full_rows(int(steps), WORKLOADS[workload]), Path(folder))
    print(json.dumps({"tokensPerSecond": speed(run), "waitPolicy": os.environ.get("OMP_WAIT_POLICY", "")}))


if __name__ == "__main__":
    main()
