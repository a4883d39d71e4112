"""The term of a reward model. It reads text, not tokens, so its vocabulary need not be the policy's: prompt and answer
are rendered by its own chat template and encoded by its own vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from stagecoach_trainer.models.reward import RewardModel
from stagecoach_trainer.rewards.term import Completion, Term
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.samples.scoring import encode_answered


class ModelTerm(Term):
    """What a reward model says."""

    def __init__(self, model: RewardModel, batch_rows: int) -> None:
        self.model = model
        self._batch_rows = batch_rows

    def shard(self, shard: Callable[[nn.Module], None], device: torch.device, world: World) -> None:
        """Share the model's parameters out over the ranks by `shard`."""
        self.model = self.model.sharded(shard, device, world)

    def sit_out(self) -> None:
        self.values([])

    def values(self, batch: Sequence[Completion]) -> list[float]:
        return self.model.score_ids(self._encoded(batch), self._batch_rows)

    def _encoded(self, batch: Sequence[Completion]) -> list[npt.NDArray[np.int32]]:
        """Return the token ids of each answer behind its prompt, and in front the system prompt of the prompt's domain.
        A model without domains heeds none."""
        places: dict[str | None, list[int]] = {}
        for index, judged in enumerate(batch):
            places.setdefault(judged.domain if self.model.domains else None, []).append(index)
        found: dict[int, npt.NDArray[np.int32]] = {}
        for domain, indices in places.items():
            answered = [(batch[index].prompt, batch[index].answer) for index in indices]
            ids = encode_answered(self.model.tokenizer, answered, self.model.system_prompt(domain))
            found.update(zip(indices, ids, strict=True))
        return [found[index] for index in range(len(batch))]
