"""Capacity: which of the ready stages fit in addition to those that run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stagecoach_api.spec import Resources
from stagecoach_core.values import Capacity


def num_ranks(resources: Resources) -> int:
    """Return the number of ranks of a stage."""
    return resources.num_nodes * resources.num_ranks_per_node


def select_fitting(
    ready: Sequence[str], occupying: Sequence[str], ranks: Mapping[str, int], capacity: Capacity
) -> list[str]:
    """Return the stages of `ready`, in that order, that can start now.

    `occupying`: stages of the live attempts, including those that are stopping. `ranks`: number of ranks by stage, of
    all stages. A smaller stage may start before a larger one that does not fit. A stage larger than the whole capacity
    runs alone rather than never.
    """
    slots_taken = len(occupying)
    ranks_taken = sum(ranks.get(name, 1) for name in occupying)
    started: list[str] = []
    for name in ready:
        has_slot = capacity.slots is None or slots_taken < max(1, capacity.slots)
        has_ranks = capacity.ranks is None or ranks_taken + ranks[name] <= capacity.ranks or slots_taken == 0
        if has_slot and has_ranks:
            started.append(name)
            slots_taken += 1
            ranks_taken += ranks[name]
    return started


def describe_limits(capacity: Capacity) -> str:
    """Return what a stage that does not fit is waiting for."""
    limits = [
        f"{count} {unit}{'' if count == 1 else 's'}"
        for count, unit in ((capacity.slots, "slot"), (capacity.ranks, "rank"))
        if count is not None
    ]
    return f"capacity: this machine has {' and '.join(limits)}" if limits else "capacity"
