"""The term of a reward model. It reads text, not tokens, so its vocabulary need not be the policy's: prompt and answer
are rendered by its own chat template and encoded by its own vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from stagecoach_trainer.context import World
from stagecoach_trainer.models.reward import RewardModel
from stagecoach_trainer.rewards.judged import Judged, Term


class ModelTerm(Term):
    """What a reward model says."""

    def __init__(self, model: RewardModel, batch_rows: int) -> None:
        self.model = model
        self._batch_rows = batch_rows

    def shard(self, shard: Callable[[nn.Module], None], device: torch.device, world: World) -> None:
        """Share the model's parameters out over the ranks by `shard`."""
        self.model = self.model.shared_out(shard, device, world)

    def sit_out(self) -> None:
        self.values([])

    def values(self, batch: Sequence[Judged]) -> list[float]:
        return self.model.score_texts([(judged.prompt, judged.answer) for judged in batch], self._batch_rows)
