"""Preferences that a reward model has not learnt from: does it rank them as people did?

K answers to a prompt, P pairs, N answers of a whole set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from stagecoach_api.kinds.reward_model import PreferenceLoss
from stagecoach_trainer.align.objectives import collate_pairs, preference_losses
from stagecoach_trainer.align.ranking import pair_figures, pair_weights
from stagecoach_trainer.batches.shard import shard_batch
from stagecoach_trainer.loop.job import Report
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.samples.groups import Group


@dataclass(frozen=True)
class _Numbered:
    """A group and the number of its first answer among those of the set (a `Unit`)."""

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
    """Return the reward of every answer of `groups`, one after the other, fp64 [N]; the same on every rank.

    `module`: a `RewardLoss`. The groups are shared out over the ranks.
    """
    sizes = [len(group.sequences) for group in groups]
    firsts = np.cumsum([0, *sizes])
    numbered = [_Numbered(group, int(first)) for group, first in zip(groups, firsts[:-1], strict=True)]
    share = shard_batch(numbered, micro_batch_groups, world.rank, world.size)
    rewards = torch.zeros(int(firsts[-1]), dtype=torch.float64)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for index, part in enumerate(share.micro_batches):
                batch = collate_pairs([item.group for item in part], by_prompt=False).to(device)
                found = iter(module.rewards(batch).double().cpu())
                for item in part:
                    for place in range(item.first, item.first + len(item.group.sequences)):
                        rewards[place] = next(found)
                report(index + 1, len(share.micro_batches))
    finally:
        module.train(was_training)
    if world.size > 1:
        dist.all_reduce(rewards)
    return rewards


@dataclass(frozen=True)
class PairRewards:
    """The rewards of both answers of every pair."""

    better: Tensor
    """fp64 [P]."""

    worse: Tensor
    """fp64 [P]."""

    weights: Tensor
    """Of each pair in the loss: their sum is the divisor, fp64 [P]."""

    def figures(self, loss: PreferenceLoss) -> dict[str, float]:
        """Return `loss`, `accuracy`, `margin` and `calibrationError`."""
        losses = preference_losses(loss, self.better, self.worse)
        mean = float((losses * self.weights).sum() / self.weights.sum())
        return {"loss": mean, **pair_figures(self.better, self.worse)}


def join_rewards(parts: Sequence[PairRewards]) -> PairRewards:
    """Return the pairs of several sets as one."""
    return PairRewards(*(torch.cat([getattr(part, name) for part in parts]) for name in ("better", "worse", "weights")))


class PreferenceSet:
    """Held-out preferences with the name their figures get (a `Measurable`)."""

    def __init__(self, name: str, groups: Sequence[Group], loss: PreferenceLoss, domain: str | None = None) -> None:
        self.name = name
        self.groups = tuple(groups)
        self.domain = domain
        self.latest: PairRewards | None = None
        """What the last measurement found. None: there was none."""
        self._loss = loss

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return `loss`, `accuracy` (an equal pair is half right), `margin` and `calibrationError`."""
        rewards = measure_rewards(module, self.groups, micro_batch_rows, device, world, report)
        better, worse = pair_places(self.groups)
        pairs = torch.tensor([len(group.better) for group in self.groups])
        weights = torch.ones(len(better), dtype=torch.float64) if self._loss.ranked is None else pair_weights(pairs)
        self.latest = PairRewards(rewards[better], rewards[worse], weights)
        return self.latest.figures(self._loss)


class TrainingSample:
    """Answers of the training set, whose mean reward the bias makes 0 (a `Measurable`, measured once, at the end)."""

    name = "training"

    def __init__(self, groups: Sequence[Group], chosen_only: bool) -> None:
        self.groups = tuple(groups)
        self._chosen_only = chosen_only

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return `meanReward`, of the best answer to each prompt or of all answers, and `rewardDeviation` likewise."""
        rewards = measure_rewards(module, self.groups, micro_batch_rows, device, world, report)
        if self._chosen_only:
            _, worse = pair_places(self.groups)
            best = torch.ones(len(rewards), dtype=torch.bool)
            best[worse] = False
            rewards = rewards[best]
        return {"meanReward": float(rewards.mean()), "rewardDeviation": float(rewards.std(correction=0))}


def pair_places(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Return the numbers of each pair's better and worse answer among the answers of all groups [P], [P]."""
    firsts = np.cumsum([0, *(len(group.sequences) for group in groups)])[:-1]
    better = [group.better + first for group, first in zip(groups, firsts, strict=True)]
    worse = [group.worse + first for group, first in zip(groups, firsts, strict=True)]
    return _joined(better), _joined(worse)


def _joined(parts: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)


def length_baseline(groups: Sequence[Group]) -> float:
    """Return the accuracy of preferring the answer with more tokens; an equal pair is half right.

    People like longer answers, so a reward model that is no better has learnt nothing else.
    """
    right: list[float] = []
    for group in groups:
        lengths = np.array([len(sequence.ids) for sequence in group.sequences])
        right += (0.5 * (1.0 + np.sign(lengths[group.better] - lengths[group.worse]))).tolist()
    return float(np.mean(right))
