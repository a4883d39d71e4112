"""Held-out measurements of a reward model: does it rank unseen answers as people did?

P pairs, N answers of a whole set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stagecoach_api.kinds.reward_model import PreferenceLoss
from stagecoach_trainer.align.groups import pair_rows
from stagecoach_trainer.align.reward_objective import collate_pairs, preference_losses
from stagecoach_trainer.batches.shard import shard_batch
from stagecoach_trainer.loop.job import Report
from stagecoach_trainer.losses.ranking import pair_figures, pair_weights
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.samples.groups import Group


@dataclass(frozen=True)
class _NumberedGroup:
    """A group and the row of its first answer within the set (a `Unit`)."""

    group: Group
    first: int

    @property
    def num_tokens(self) -> int:
        return self.group.num_tokens

    @property
    def num_targets(self) -> int:
        return self.group.num_targets


def measure_rewards(
    module: Any, groups: Sequence[Group], micro_batch_groups: int, device: torch.device, world: World, report: Report
) -> Tensor:
    """Return the reward of every answer of `groups`, in row order, fp64 [N]; the same on every rank.

    `module`: a `RewardLoss`, evaluated without dropout. Each rank scores its share of the groups.
    """
    sizes = [len(group.sequences) for group in groups]
    # Rows of the whole set: ranks then write disjoint parts of one tensor, which all_reduce adds up.
    firsts = np.cumsum([0, *sizes])
    numbered = [_NumberedGroup(group, int(first)) for group, first in zip(groups, firsts[:-1], strict=True)]
    share = shard_batch(numbered, micro_batch_groups, world.rank, world.size)
    rewards = torch.zeros(int(firsts[-1]), dtype=torch.float64)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for index, part in enumerate(share.micro_batches):
                batch = collate_pairs([item.group for item in part], by_prompt=False).to(device)
                scores = iter(module.rewards(batch).double().cpu())
                for item in part:
                    for row in range(item.first, item.first + len(item.group.sequences)):
                        rewards[row] = next(scores)
                report(index + 1, len(share.micro_batches))
    finally:
        module.train(was_training)
    if world.size > 1:
        dist.all_reduce(rewards)  # each row is 0 on all ranks but one
    return rewards


@dataclass(frozen=True)
class PairRewards:
    """The rewards of both answers of every pair."""

    better: Tensor
    """fp64 [P]."""

    worse: Tensor
    """fp64 [P]."""

    weights: Tensor
    """Weight of each pair in the loss, fp64 [P]; their sum is the divisor."""

    def figures(self, loss: PreferenceLoss) -> dict[str, float]:
        """Return `loss`, `accuracy`, `margin` and `calibrationError`."""
        losses = preference_losses(loss, self.better, self.worse)
        mean = float((losses * self.weights).sum() / self.weights.sum())
        return {"loss": mean, **pair_figures(self.better, self.worse)}


def join_rewards(parts: Sequence[PairRewards]) -> PairRewards:
    """Return the pairs of several sets concatenated."""
    return PairRewards(*(torch.cat([getattr(part, name) for part in parts]) for name in ("better", "worse", "weights")))


class PreferenceSet:
    """A named set of held-out preferences (a `Measurable`)."""

    def __init__(self, name: str, groups: Sequence[Group], loss: PreferenceLoss, domain: str | None = None) -> None:
        self.name = name
        self.groups = tuple(groups)
        self.domain = domain
        self.latest: PairRewards | None = None
        """Result of the last measurement; None before the first one."""
        self._loss = loss

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return `loss`, `accuracy` (ties count ½), `margin` and `calibrationError`."""
        rewards = measure_rewards(module, self.groups, micro_batch_rows, device, world, report)
        better, worse = pair_rows(self.groups)
        pairs = torch.tensor([len(group.better) for group in self.groups])
        weights = torch.ones(len(better), dtype=torch.float64) if self._loss.ranked is None else pair_weights(pairs)
        self.latest = PairRewards(rewards[better], rewards[worse], weights)
        return self.latest.figures(self._loss)


class TrainingSample:
    """Answers of the training set from which the bias is computed (a `Measurable`, measured once, after training).

    `chosen_only`: only the best answers to each prompt count.
    """

    name = "training"

    def __init__(self, groups: Sequence[Group], chosen_only: bool) -> None:
        self.groups = tuple(groups)
        self._chosen_only = chosen_only

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return `meanReward` and `rewardDeviation`."""
        rewards = measure_rewards(module, self.groups, micro_batch_rows, device, world, report)
        if self._chosen_only:
            _, worse = pair_rows(self.groups)
            best = torch.ones(len(rewards), dtype=torch.bool)
            best[worse] = False  # the best answers are never the worse of a pair
            rewards = rewards[best]
        return {"meanReward": float(rewards.mean()), "rewardDeviation": float(rewards.std(correction=0))}


def length_baseline(groups: Sequence[Group]) -> float:
    """Return the accuracy of preferring the answer with more tokens; ties count ½.

    People tend to prefer longer answers, so a reward model that does not beat this has learnt nothing but length.
    """
    right: list[float] = []
    for group in groups:
        lengths = np.array([len(sequence.ids) for sequence in group.sequences])
        right += (0.5 * (1.0 + np.sign(lengths[group.better] - lengths[group.worse]))).tolist()
    return float(np.mean(right))
