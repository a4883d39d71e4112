"""Measuring in pairs: both sides run alternately, so that other load on the machine slows both alike."""

from __future__ import annotations

import json
import operator
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
Run = TypeVar("Run")
Job = TypeVar("Job")

ROUNDS = 5
"""Pairs measured for every figure; the figure is their median."""


@dataclass(frozen=True)
class Goal:
    """The limit that a figure must meet."""

    sign: str
    """`≥`, `>`, `≤` or `<`."""
    limit: float

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"

    def met_by(self, value: float) -> bool:
        compare = {"≥": operator.ge, ">": operator.gt, "≤": operator.le, "<": operator.lt}[self.sign]
        return bool(compare(value, self.limit))


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    unit: str
    ours: float
    peer: float | None
    """None if there is no peer: the goal then applies to `ours`."""
    ratio: float | None
    goal: str
    met: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compared(name: str, unit: str, pairs: Sequence[tuple[float, float]], goal: Goal) -> Figure:
    """Return the medians of (ours, peer) and the median of their ratios, to which the goal applies."""
    ratio = statistics.median(ours / peer for ours, peer in pairs)
    ours = statistics.median(ours for ours, _ in pairs)
    peer = statistics.median(peer for _, peer in pairs)
    return Figure(name, unit, ours, peer, ratio, f"ratio {goal}", goal.met_by(ratio))


def alone(name: str, unit: str, values: Sequence[float], goal: Goal) -> Figure:
    """Return the median of values that have no peer."""
    value = statistics.median(values)
    return Figure(name, unit, value, None, None, str(goal), goal.met_by(value))


def gain(name: str, unit: str, ours: Sequence[float], peer: Sequence[float], goal: Goal) -> Figure:
    """Return the means of two series; the goal applies to ours minus the peer's."""
    mine, theirs = statistics.fmean(ours), statistics.fmean(peer)
    return Figure(name, unit, mine, theirs, None, f"gain {goal}", goal.met_by(mine - theirs))


def difference(name: str, ours: Sequence[float], peer: Sequence[float], goal: Goal) -> Figure:
    """Compare two series of losses: the goal applies to their largest difference, the figure shows the last losses."""
    if len(ours) != len(peer) or not ours:
        raise ValueError(f"{name}: got {len(ours)} and {len(peer)} losses; expected equally many, at least 1")
    largest = max(abs(a - b) for a, b in zip(ours, peer, strict=True))
    return Figure(name, "nats per token", ours[-1], peer[-1], None, f"difference {goal}", goal.met_by(largest))


def alternate(ours: Callable[[int], Run], peer: Callable[[int], Run], rounds: int = ROUNDS) -> list[tuple[Run, Run]]:
    """Run both alternately, `rounds` times each, swapping their order every round; return (ours, peer) per round."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            theirs, mine = peer(number), ours(number)
        else:
            mine, theirs = ours(number), peer(number)
        pairs.append((mine, theirs))
    return pairs


# -- processes ---------------------------------------------------------------------------------------------------------


def side_by_side(run: Callable[[Job], Run], jobs: Sequence[Job]) -> list[Run]:
    """Return `run(job)` for every job, computed in parallel with one core each. Not for anything that is timed.

    `run` and the jobs are pickled for new processes: a function of a module; dataclasses, paths.
    """
    with ProcessPoolExecutor(num_threads(), get_context("spawn"), _compute_with_one_thread) as pool:
        return list(pool.map(run, jobs))


def _compute_with_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Child:
    """A process that has ended."""

    started: float
    """Seconds since the epoch, just before the process was started."""
    report: Mapping[str, Any]
    """The last line it printed, parsed as JSON."""


def run_child(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
    folder: Path = ROOT,
) -> Child:
    """Run `python ARGUMENTS` in `folder`. Raises RuntimeError with its output if it fails."""
    started = time.time()
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(num_threads()), **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    lines = done.stdout.strip().splitlines()
    return Child(started, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {})


def peak_bytes() -> int:
    """Return the peak resident set size of this process.

    On Linux it is read from /proc: `ru_maxrss` survives exec, so a child would start with its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def num_threads() -> int:
    """Return the number of threads that both sides compute with: one for every core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- results -----------------------------------------------------------------------------------------------------------


def write_result(path: Path, found: Any) -> None:
    """Write results as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
