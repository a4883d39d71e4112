"""The prompts of each update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagecoach_trainer.batches.mixing import Mix
from stagecoach_trainer.samples.prompts import Prompt


@dataclass(frozen=True)
class PromptPlan:
    """Selects the prompts of each update: a pure function of the seed and the update's number."""

    sets: tuple[Sequence[Prompt], ...]
    mix: Mix
    samples_per_update: int
    num_updates: int

    def prompts(self, update: int) -> list[Prompt]:
        """Return the prompts of an update, over all ranks."""
        first = update * self.samples_per_update
        draws = self.mix.draws(first, first + self.samples_per_update)
        return [self.sets[int(number)][int(unit)] for number, unit in zip(draws.sets, draws.units, strict=True)]
