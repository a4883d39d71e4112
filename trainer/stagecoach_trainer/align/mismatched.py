"""Prompts with answers to other prompts, from which KTO's reference point is estimated (arXiv 2402.01306).

The point must not depend on how a batch is divided among ranks, so each step has its own sequences, a pure function of
the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stagecoach_trainer.batches.rows import StepPlan
from stagecoach_trainer.samples.groups import Group, TokenSequence

MOST_MISMATCHED = 64
"""Upper limit of the sequences from which one reference point is estimated."""


def mismatched(sequences: Sequence[TokenSequence], capacity: int, most: int = MOST_MISMATCHED) -> list[TokenSequence]:
    """Return up to `most` prompts, each followed by the next answer to another prompt that fits into `capacity` tokens
    with it. Empty if all sequences have the same prompt."""
    found: list[TokenSequence] = []
    for index, own in enumerate(sequences[:most]):
        prompt = own.ids[: own.num_prompt]
        following = [*sequences[index + 1 :], *sequences[:index]]
        other = next((item for item in following if _fits_after(prompt, item, capacity)), None)
        if other is not None:
            ids = np.concatenate([prompt, other.ids[other.num_prompt :]])
            found.append(TokenSequence(ids, len(prompt)))
    return found


def _fits_after(prompt: np.ndarray, other: TokenSequence, capacity: int) -> bool:
    fits = len(prompt) + len(other.ids) - other.num_prompt <= capacity
    return fits and not np.array_equal(prompt, other.ids[: other.num_prompt])


@dataclass(frozen=True)
class PointedUnit:
    """One answer, and the mismatched sequences of its step (a `Unit`)."""

    groups: tuple[Group, ...]
    """One; none in a unit by which a rank without work takes part in computing the step's point."""

    step: int
    sequences: tuple[TokenSequence, ...]
    """The step's mismatched sequences, the same in all its units."""

    @property
    def num_tokens(self) -> int:
        return sum(group.num_tokens for group in self.groups)

    @property
    def num_targets(self) -> int:
        return sum(group.num_targets for group in self.groups)


class PointedPlan:
    """A plan whose units carry their step's mismatched sequences (a `StepPlan`)."""

    def __init__(self, plan: StepPlan, sequence_length: int, world_size: int) -> None:
        self._plan = plan
        self._sequence_length = sequence_length
        self._world_size = world_size

    @property
    def num_steps(self) -> int:
        return self._plan.num_steps

    def rows(self, step: int) -> list[PointedUnit]:
        """Return the step's units, and silent ones where there are fewer than ranks: under ZeRO-3 all ranks must
        compute together."""
        groups: list[Group] = list(self._plan.rows(step))  # type: ignore[arg-type] # the plan's units are groups
        sequences = [sequence for group in groups for sequence in group.sequences]
        point = tuple(mismatched(sequences, self._sequence_length))
        silent = max(0, self._world_size - len(groups))
        parts = [*((group,) for group in groups), *[()] * silent]
        return [PointedUnit(part, step, point) for part in parts]
