"""How everything here is measured: in pairs, one after the other, so that a busy machine slows both alike."""

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
"""Pairs of every figure; a figure is their median."""


@dataclass(frozen=True)
class Goal:
    """What a figure must reach."""

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
    """None: there is no peer; the goal is then for `ours`."""
    ratio: float | None
    goal: str
    met: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compared(name: str, unit: str, pairs: Sequence[tuple[float, float]], goal: Goal) -> Figure:
    """Return the medians of (ours, peer) and the median of their ratios, which the goal is for."""
    ratio = statistics.median(ours / peer for ours, peer in pairs)
    ours = statistics.median(ours for ours, _ in pairs)
    peer = statistics.median(peer for _, peer in pairs)
    return Figure(name, unit, ours, peer, ratio, f"ratio {goal}", goal.met_by(ratio))


def alone(name: str, unit: str, values: Sequence[float], goal: Goal) -> Figure:
    """Return the median of a figure that has no peer."""
    value = statistics.median(values)
    return Figure(name, unit, value, None, None, str(goal), goal.met_by(value))


def gain(name: str, unit: str, ours: Sequence[float], peer: Sequence[float], goal: Goal) -> Figure:
    """Return the means of two series; the goal is for what ours has more."""
    mine, theirs = statistics.fmean(ours), statistics.fmean(peer)
    return Figure(name, unit, mine, theirs, None, f"gain {goal}", goal.met_by(mine - theirs))


def difference(name: str, ours: Sequence[float], peer: Sequence[float], goal: Goal) -> Figure:
    """Return the largest difference of two series of losses; `ours` and `peer` of the figure are the last losses."""
    if len(ours) != len(peer) or not ours:
        raise ValueError(f"{name}: {len(ours)} losses of ours against {len(peer)} of the peer's")
    largest = max(abs(a - b) for a, b in zip(ours, peer, strict=True))
    return Figure(name, "nats per token", ours[-1], peer[-1], None, f"difference {goal}", goal.met_by(largest))


def alternate(ours: Callable[[int], Run], peer: Callable[[int], Run], rounds: int = ROUNDS) -> list[tuple[Run, Run]]:
    """Run both in turn, `rounds` times each, the other one first every second time; return (ours, peer) per round."""
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
    """Return what `run` makes of every job, a core each, as many at once as there are: for what no clock measures.

    Both must be known by name to a new process: functions of a module, dataclasses, paths.
    """
    with ProcessPoolExecutor(num_threads(), get_context("spawn"), _compute_with_one_thread) as pool:
        return list(pool.map(run, jobs))


def _compute_with_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Child:
    """What a finished process came to."""

    started: float
    """Seconds since the epoch, just before the process was made."""
    report: Mapping[str, Any]
    """What it printed as its last line, read as JSON."""


def run_child(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
    folder: Path = ROOT,
) -> Child:
    """Run `python ARGUMENTS` in `folder`; raise RuntimeError with its words where it fails."""
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
    """Largest resident set this process has had.

    On Linux from its own memory map: `ru_maxrss` survives exec, so a child would start with its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def num_threads() -> int:
    """Threads both sides compute with: every core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- results -----------------------------------------------------------------------------------------------------------


def write_result(path: Path, found: Any) -> None:
    """Write what was measured as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
