"""The input and the result of PPO training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_trainer.batches.rows import StepPlan
from stagecoach_trainer.batches.schedule import learning_rate
from stagecoach_trainer.ppo.prompt_plan import PromptPlan
from stagecoach_trainer.rewards.total import RewardSum


@dataclass(frozen=True)
class PpoJob:
    """One PPO stage, ready to start."""

    config: PpoStage
    policy: nn.Module
    """A causal language model or a PEFT model around one, on the CPU in fp32, `requires_grad` set."""

    critic: nn.Module
    """A reward model of the same vocabulary, on the CPU in fp32, `requires_grad` set."""

    reference: Any | None
    """A frozen causal language model; None for the policy with its adapter disabled."""

    tokenizer: Any
    rewards: RewardSum
    prompts: PromptPlan
    text: StepPlan | None
    """Rows of text that are learnt together with the answers, one step per optimiser step; None for no text."""

    inference_only: Sequence[nn.Module] = ()
    """Models that are not trained, such as reward models. Frozen weights that policy, critic and these have in common
    are stored once."""

    critic_bias: float = 0.0
    """Constant added to the critic's output; not trained."""

    @property
    def mini_batches(self) -> int:
        """Optimiser steps in one pass over an update's answers."""
        samples = self.prompts.samples_per_update
        return samples // (self.config.policy.mini_batch_samples or samples)

    def policy_rate(self, update: int) -> float:
        """Return the policy's learning rate in an update."""
        return self._rate(self.config.optimizer.learning_rate, update)

    def critic_rate(self, update: int) -> float:
        """Return the critic's learning rate in an update."""
        optimizer = self.config.critic.optimizer or self.config.optimizer
        return self._rate(optimizer.learning_rate, update)

    def _rate(self, peak: float, update: int) -> float:
        return learning_rate(self.config.schedule, peak, update, self.prompts.num_updates)


@dataclass(frozen=True)
class PpoResult:
    """The result of training. Equal runs give equal values, whether interrupted or not."""

    tokens: int
    """Tokens of prompts and answers that the policy was trained on."""

    updates: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = field(default_factory=tuple)
