"""The objective of reward models: from groups of ranked answers to a summed loss.

B sequences, T tokens of the longest, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_api.kinds.reward_model import PreferenceLoss
from stagecoach_trainer.align.groups import pair_rows, sequences_of
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.engine.objective import NUM_PROVED, UnpackedObjective
from stagecoach_trainer.kernels.causal import DecoderLoss
from stagecoach_trainer.losses.ranking import barrier, focal_losses, pair_losses, pair_weights
from stagecoach_trainer.models.reward import RewardModule, last_rewards, pad_right
from stagecoach_trainer.samples.groups import Counting, Group


@dataclass(frozen=True)
class PairBatch:
    """Whole groups as one micro-batch."""

    tokens: Tensor
    """Token ids [B, T], padded on the right."""

    last: Tensor
    """Position of each sequence's last token [B]."""

    better: Tensor
    """Row of each pair's better answer [P]."""

    worse: Tensor
    """Row of each pair's worse answer [P]."""

    weights: Tensor
    """Weight of each pair's loss, fp32 [P]."""

    num_targets: int
    """This micro-batch's share of the loss's divisor: its number of pairs or prompts."""

    def to(self, device: torch.device) -> PairBatch:
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> PairBatch:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        return PairBatch(
            change(self.tokens),
            change(self.last),
            change(self.better),
            change(self.worse),
            change(self.weights),
            self.num_targets,
        )


def counting_of(loss: PreferenceLoss) -> Counting:
    """Return the unit over which a preference loss is averaged: prompts for `ranked`, else pairs."""
    return Counting.PAIRS if loss.ranked is None else Counting.GROUPS


def collate_pairs(groups: Sequence[Group], by_prompt: bool) -> PairBatch:
    """Collate whole groups as one micro-batch, padded to the longest sequence.

    `by_prompt`: the weights of each prompt's pairs sum to 1; otherwise every pair has weight 1.
    """
    if not groups:  # of a rank that has no more groups: one padding token, so that it still runs a forward pass
        nothing = torch.empty(0, dtype=torch.int64)
        one = torch.zeros(1, dtype=torch.int64)
        return PairBatch(one[None], one, nothing, nothing, torch.empty(0), 0)
    tokens, last = pad_right([sequence.ids for sequence in sequences_of(groups)])
    better, worse = pair_rows(groups)
    pairs = torch.tensor([len(group.better) for group in groups])
    weights = pair_weights(pairs).float() if by_prompt else torch.ones(len(better))
    return PairBatch(tokens, last, better, worse, weights, len(groups) if by_prompt else len(better))


class RewardLoss(RewardModule):
    """Owns a reward model; its forward pass is the loss of a micro-batch of preferences."""

    def __init__(self, model: nn.Module, loss: PreferenceLoss) -> None:
        super().__init__(model)
        self._loss = loss

    def rewards(self, batch: PairBatch) -> Tensor:
        """Return the reward of each sequence, fp32 [B]."""
        return last_rewards(self.model, batch.tokens, batch.last, self.positions_keyword)

    def forward(self, batch: PairBatch, scale: float) -> Tensor:
        """Return `scale` · the weighted sum of the pairs' losses, an fp32 scalar."""
        # Each answer is computed once, however many pairs it is in.
        rewards = self.rewards(batch)
        losses = preference_losses(self._loss, rewards[batch.better], rewards[batch.worse])
        total = scale * (losses * batch.weights).sum()
        # Without pairs the loss would not depend on the weights, and this rank would skip the gradients' all-reduce.
        return total if batch.num_targets else total + 0.0 * rewards.sum()


def preference_losses(loss: PreferenceLoss, better: Tensor, worse: Tensor) -> Tensor:
    """Return the loss of each pair [P] from the rewards of its answers, `better` [P] and `worse` [P].

    The focal loss's barrier is averaged over a pair's two rewards; the paper (arXiv 2403.17297) does not specify it.
    """
    if loss.pair is not None:
        return pair_losses(better, worse, loss.pair.margin, loss.pair.centering)
    if loss.focal is not None:
        limit, weight = loss.focal.limit, loss.focal.barrier
        penalty = weight * (barrier(better, limit) + barrier(worse, limit)) / 2 if weight else 0.0
        return focal_losses(better, worse, loss.focal.gamma) + penalty
    return pair_losses(better, worse)


class RewardObjective(UnpackedObjective):
    """The training loop's objective for a stage's `loss` over pairs of rewards."""

    def __init__(self, loss: PreferenceLoss) -> None:
        self._loss = loss

    def module(self, model: nn.Module) -> DecoderLoss:
        return RewardLoss(model, self._loss)

    def samples(self, units: Sequence[Any]) -> Sequence[Ids]:
        return [sequence.ids for sequence in sequences_of(units[:NUM_PROVED])]

    def collate(self, units: Sequence[Any]) -> PairBatch:
        return collate_pairs(units, by_prompt=self._loss.ranked is not None)
