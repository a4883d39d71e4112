"""Answers per second of both PPO loops, and whether they learn equally well."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.alignment import ppo_task as task
from bench.alignment.peer_environment import QUIET, peer_python
from bench.measuring import Figure, Goal, alternate, compared, run_child

PRECISION = "bf16"
"""Also TRL's default."""
Report = Mapping[str, Any]


def figures() -> list[Figure]:
    """Measure both sides with five seeds each."""
    python = peer_python()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.make_task(folder)

        def run(module: str, seed: int, interpreter: str) -> Report:
            arguments = ["-m", f"bench.alignment.{module}", str(folder), str(seed), PRECISION, str(task.UPDATES)]
            return run_child(arguments, QUIET, interpreter).report

        pairs = alternate(
            lambda number: run("ppo_ours", number, sys.executable),
            lambda number: run("ppo_peer", number, python),
        )
    speeds = [(samples_per_second(ours), samples_per_second(peer)) for ours, peer in pairs]
    return [
        compared(f"PPO, {PRECISION}", "samples/s", speeds, Goal("≥", 2.0)),
        within([final_reward(ours) for ours, _ in pairs], [final_reward(peer) for _, peer in pairs]),
    ]


def samples_per_second(report: Report) -> float:
    """Return the speed of the median update, without the first one, which is a warm-up."""
    return task.SAMPLES / float(statistics.median(report["seconds"]))


def final_reward(report: Report) -> float:
    """Return the mean reward of the last updates."""
    return statistics.fmean(report["rewards"][-task.LAST :])


def within(ours: Sequence[float], peer: Sequence[float]) -> Figure:
    """Compare the median of our seeds with the range of the peer's: the goal is to be within it."""
    lowest, highest = min(peer), max(peer)
    middle = statistics.median(ours)
    goal = f"in {lowest:.3f} to {highest:.3f}"
    met = lowest <= middle <= highest
    return Figure("PPO, final reward", "mean of seeds", middle, statistics.median(peer), None, goal, met)
