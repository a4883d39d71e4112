"""Tokens per second of both reward-model trainers, and whether their losses are equal."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.alignment import preference_task as task
from bench.alignment.peer_environment import QUIET, peer_python
from bench.measuring import Figure, Goal, alternate, compared, difference, run_child

Report = Mapping[str, Any]
UNIT = "nats per pair"


def figures() -> list[Figure]:
    """Measure both sides."""
    python = peer_python()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.make_task(folder)
        pairs = alternate(
            lambda _: run_child(["-m", "bench.alignment.reward_ours", name], QUIET).report,
            lambda _: run_child(["-m", "bench.alignment.reward_peer", name], QUIET, python).report,
        )
        tokens = statistics.mean(map(task.tokens_of, task.read_steps(folder)[1:]))
    speeds = [(tokens / statistics.median(a["seconds"]), tokens / statistics.median(b["seconds"])) for a, b in pairs]
    ours, peer = pairs[0]
    return [
        compared("reward model, bf16", "tokens/s", speeds, Goal("≥", 1.0)),
        replace(difference("reward model, loss in bf16", ours["losses"], peer["losses"], Goal("≤", 5e-3)), unit=UNIT),
    ]
