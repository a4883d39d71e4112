"""Which of the stages that are ready fit beside those that live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stagecoach_api.spec import Resources
from stagecoach_core.values import Capacity


def num_ranks(resources: Resources) -> int:
    """Return how many ranks a stage runs."""
    return resources.num_nodes * resources.num_ranks_per_node


def fitting(ready: Sequence[str], living: Sequence[str], ranks: Mapping[str, int], capacity: Capacity) -> list[str]:
    """Return the stages of `ready`, in that order, that can start now.

    `living`: stages whose attempts still hold their place, those being stopped included. `ranks`: ranks by stage, for
    all of them. A stage that is larger than the whole capacity runs alone rather than never.
    """
    slots_taken = len(living)
    ranks_taken = sum(ranks.get(name, 1) for name in living)
    started: list[str] = []
    for name in ready:
        has_slot = capacity.slots is None or slots_taken < max(1, capacity.slots)
        has_ranks = capacity.ranks is None or ranks_taken + ranks[name] <= capacity.ranks or slots_taken == 0
        if has_slot and has_ranks:
            started.append(name)
            slots_taken += 1
            ranks_taken += ranks[name]
    return started


def describe(capacity: Capacity) -> str:
    """Return what a stage that does not fit waits for."""
    limits = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in ((capacity.slots, "slot"), (capacity.ranks, "rank"))
        if count is not None
    ]
    return f"room to run: this machine has {' and '.join(limits)}" if limits else "room to run"
