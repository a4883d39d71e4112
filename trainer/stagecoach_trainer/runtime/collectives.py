"""Collective operations on single numbers. Each call waits for all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from stagecoach_trainer.runtime.context import World


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Return the sums over all ranks, on every rank."""
    return list(values) if world.size == 1 else _reduced(values, dist.ReduceOp.SUM)


def max_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Return the maxima over all ranks, on every rank."""
    return list(values) if world.size == 1 else _reduced(values, dist.ReduceOp.MAX)


def agree(value: int | None, world: World) -> int | None:
    """Return rank 0's value, a non-negative number or None, on every rank."""
    encoded = -1.0 if value is None else float(value)
    agreed = sum_over_ranks([encoded if world.is_main else 0.0], world)[0]
    return None if agreed < 0 else int(agreed)


def wait_for_all(world: World) -> None:
    """Return once every rank has called it."""
    sum_over_ranks([0.0], world)


def _reduced(values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared, how)
    found: list[float] = shared.tolist()
    return found
