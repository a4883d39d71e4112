"""The reward model term.

Prompt and answer are rendered by the reward model's own chat template and encoded by its own tokenizer, so its
vocabulary may differ from the policy's.
"""

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
    """The reward of a reward model."""

    def __init__(self, model: RewardModel, batch_rows: int) -> None:
        self.model = model
        self._batch_rows = batch_rows

    def shard(self, shard: Callable[[nn.Module], None], device: torch.device, world: World) -> None:
        """Shard the model's parameters across ranks by `shard`."""
        self.model = self.model.sharded(shard, device, world)

    def sit_out(self) -> None:
        self.values([])

    def values(self, batch: Sequence[Completion]) -> list[float]:
        return self.model.score_ids(self._encoded(batch), self._batch_rows)

    def _encoded(self, batch: Sequence[Completion]) -> list[npt.NDArray[np.int32]]:
        """Return the token ids of each answer after its prompt and the system prompt of the prompt's domain. A model
        without domains ignores them."""
        by_domain: dict[str | None, list[int]] = {}
        for index, completion in enumerate(batch):
            by_domain.setdefault(completion.domain if self.model.domains else None, []).append(index)
        found: dict[int, npt.NDArray[np.int32]] = {}
        for domain, indices in by_domain.items():
            answered = [(batch[index].prompt, batch[index].answer) for index in indices]
            tools = [batch[index].tools for index in indices]
            ids = encode_answered(self.model.tokenizer, answered, self.model.system_prompt(domain), tools)
            found.update(zip(indices, ids, strict=True))
        return [found[index] for index in range(len(batch))]
