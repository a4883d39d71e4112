"""What an update is made with, put together once: prompts, text beside them, the four models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_api.training import Precision
from stagecoach_trainer.batches.mixing import Mix
from stagecoach_trainer.batches.rows import StepPlan
from stagecoach_trainer.batches.schedule import learning_rate
from stagecoach_trainer.engine.precision import MixedPrecision
from stagecoach_trainer.kernels.answer_log_probs import AnswerBatch
from stagecoach_trainer.ppo.objectives import Policy
from stagecoach_trainer.rewards.total import RewardSum
from stagecoach_trainer.samples.prompts import Prompt


@dataclass(frozen=True)
class PromptPlan:
    """Which prompts each update answers: a pure function of the seed and the update."""

    sets: tuple[Sequence[Prompt], ...]
    mix: Mix
    samples_per_update: int
    num_updates: int

    def prompts(self, update: int) -> list[Prompt]:
        """Return the prompts of an update, over all ranks."""
        first = update * self.samples_per_update
        draws = self.mix.draws(first, first + self.samples_per_update)
        return [self.sets[int(number)][int(unit)] for number, unit in zip(draws.sets, draws.units, strict=True)]


class ReferenceModel(Protocol):
    """The model the policy is held to."""

    def log_probs(self, batch: AnswerBatch) -> Tensor:
        """Return log-probabilities of the answers' tokens [M], in nats."""


@dataclass(frozen=True)
class SeparateReference:
    """A frozen model of its own."""

    module: Policy

    def log_probs(self, batch: AnswerBatch) -> Tensor:
        found: Tensor = self.module(batch, want_entropy=False)[0]
        return found


@dataclass(frozen=True)
class BaseBelowAdapter:
    """The policy without its adapter: one copy of the base serves both."""

    policy: nn.Module

    def log_probs(self, batch: AnswerBatch) -> Tensor:
        with self._without_adapter():
            found: Tensor = self.policy(batch, want_entropy=False)[0]
        return found

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        model: Any = self.policy.model
        with model.disable_adapter():
            yield


@dataclass(frozen=True)
class PpoJob:
    """One PPO stage, ready to start."""

    config: PpoStage
    policy: nn.Module
    """A causal language model or a PEFT model around one, on the CPU in fp32, `requires_grad` set."""

    critic: nn.Module
    """A reward model of the same vocabulary, likewise."""

    reference: Any | None
    """A frozen causal language model. None: the policy without its adapter."""

    tokenizer: Any
    rewards: RewardSum
    prompts: PromptPlan
    text: StepPlan | None
    """Rows beside the answers, one step per optimiser step. None: none."""

    asked: Sequence[nn.Module] = ()
    """Models that are only asked, such as reward models: what is frozen in policy and critic as well is kept once."""

    critic_bias: float = 0.0
    """Added to all that the critic says; it is not trained."""

    @property
    def mini_batches(self) -> int:
        """Optimiser steps of one pass over an update's answers."""
        samples = self.prompts.samples_per_update
        return samples // (self.config.policy.mini_batch_samples or samples)

    def policy_rate(self, update: int) -> float:
        """Return the policy's learning rate in an update."""
        return self._rate(self.config.optimizer.learning_rate, update)

    def critic_rate(self, update: int) -> float:
        """Return the critic's learning rate in an update."""
        optimizer = self.config.critic.optimizer or self.config.optimizer
        return self._rate(optimizer.learning_rate, update)

    def _rate(self, highest: float, update: int) -> float:
        return learning_rate(self.config.schedule, highest, update, self.prompts.num_updates)


@dataclass(frozen=True)
class PpoResult:
    """What training came to. Equal runs give equal values, interrupted or not."""

    tokens: int
    """Tokens of prompts and answers that the policy was trained on."""

    updates: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = field(default_factory=tuple)


def freeze(model: Any, precision: Precision, device: torch.device) -> Any:
    """Move a model that is only asked, never trained, and let it compute as the plain engine does, so that equal
    weights give equal log-probabilities; returns it."""
    model.requires_grad_(False)
    MixedPrecision(model, precision).cast(device)
    return model.eval()


def own_mini_batches(order: np.ndarray, places: Sequence[int], parts: int) -> list[np.ndarray]:
    """Return a rank's share of each mini-batch, as indices of its experiences.

    `order`: a permutation of the places of the whole update, the same on every rank; `places`: place of each of this
    rank's experiences. So what a mini-batch consists of does not depend on how many ranks there are.
    """
    index = np.full(len(order), -1, np.int64)
    index[np.asarray(places, np.int64)] = np.arange(len(places))
    return [found[found >= 0] for found in (index[mini] for mini in np.array_split(order, parts))]


def micro_batches(indices: np.ndarray, lengths: np.ndarray, micro_rows: int) -> list[np.ndarray]:
    """Return experiences in micro-batches of like length, the longest first. `lengths`: of all experiences."""
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    return [ordered[at : at + micro_rows] for at in range(0, len(ordered), micro_rows)]
