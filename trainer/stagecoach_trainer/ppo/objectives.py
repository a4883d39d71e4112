"""What an update minimises: the policy's clipped objective, and the critic's error.

B answers with their prompts, T tokens of the longest, M tokens of answers in all, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stagecoach_api.kinds.ppo import PolicyLoss
from stagecoach_trainer.align.advantages import VARIANCE_FLOOR
from stagecoach_trainer.align.policy import clipped, policy_losses, update_kl, value_losses
from stagecoach_trainer.batches.collate import RowBatch, collate
from stagecoach_trainer.engine.objective import MicroBatch, UnpackedObjective
from stagecoach_trainer.engine.packing_check import check_packing
from stagecoach_trainer.kernels.answer_log_probs import AnswerBatch, AnswerModel, collate_answers
from stagecoach_trainer.kernels.causal import DecoderLoss
from stagecoach_trainer.kernels.unpadded import states_at
from stagecoach_trainer.models.reward import decoder_of, score_states
from stagecoach_trainer.ppo.experience import Experience, Floats


@dataclass(frozen=True)
class ExperienceBatch:
    """Experiences as one micro-batch; what is known of their tokens, fp32 [M]."""

    answers: AnswerBatch
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def tokens(self) -> Tensor:
        return self.answers.tokens

    @property
    def num_targets(self) -> int:
        return self.answers.num_targets

    def to(self, device: torch.device) -> ExperienceBatch:
        if device.type == "cpu":
            return self
        moved = (item.to(device, non_blocking=True) for item in self._figures())
        return ExperienceBatch(self.answers.to(device), *moved)

    def pinned(self) -> ExperienceBatch:
        return ExperienceBatch(self.answers.pinned(), *(item.pin_memory() for item in self._figures()))

    def _figures(self) -> tuple[Tensor, ...]:
        return self.log_probs, self.values, self.advantages, self.returns


@dataclass(frozen=True)
class Whitening:
    """Shift and scale of advantages: those of the whole update, so that ranks and mini-batches agree."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, count: float, total: float, squares: float) -> Whitening:
        """Return what makes mean 0 and deviation 1 of values with these moments."""
        mean = total / max(1.0, count)
        variance = max(0.0, squares / max(1.0, count) - mean**2)
        return cls(mean, (variance + VARIANCE_FLOOR) ** 0.5)

    def apply(self, values: Floats) -> Floats:
        """Return shifted and scaled values."""
        return ((values.astype(np.float64) - self.mean) / self.deviation).astype(np.float32)


def collate_experiences(chunk: Sequence[Experience], whitening: Whitening) -> ExperienceBatch:
    """Lay out experiences as one micro-batch."""

    def joined(name: str) -> Floats:
        return np.concatenate([np.empty(0, np.float32), *(getattr(item, name) for item in chunk)])

    return ExperienceBatch(
        collate_answers([(item.prompt, item.answer) for item in chunk]),
        torch.from_numpy(joined("log_probs")),
        torch.from_numpy(joined("values")),
        torch.from_numpy(whitening.apply(joined("advantages"))),
        torch.from_numpy(joined("returns")),
    )


class Figures:
    """Sums over tokens that a loss module notes in its forward pass, for the report."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            known = self._sums.get(name)
            self._sums[name] = value.detach().double() if known is None else known + value.detach().double()

    def take(self) -> dict[str, float]:
        """Return the sums since the last call."""
        taken, self._sums = self._sums, {}
        return {name: float(value) for name, value in taken.items()}


class Policy(AnswerModel):
    """The language model as PPO trains it: log-probabilities of answers, their loss, the next-token loss of text."""

    def __init__(self, model: nn.Module, config: PolicyLoss, temperature: float) -> None:
        super().__init__(model)
        self._config = config
        self._temperature = temperature
        self.figures = Figures()

    def log_probs(self, batch: AnswerBatch, want_entropy: bool = True) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [M] of the answers' tokens at the sampling temperature and, if wanted, the entropies
        [M] there, in nats, fp32."""
        return self.token_log_probs(batch, self._temperature, want_entropy)

    def forward(
        self,
        batch: RowBatch | ExperienceBatch | AnswerBatch | Callable[[], Tensor],
        scale: float = 1.0,
        want_entropy: bool = True,
    ) -> Any:
        """Return `scale` · the summed loss of text or of experiences; of plain answers, what `log_probs` gives; what a
        function that calls the model's modules gives: through here ZeRO-3 gathers what they need."""
        if callable(batch):
            return batch()
        if isinstance(batch, RowBatch):
            return super().forward(batch, scale)
        if isinstance(batch, AnswerBatch):
            return self.log_probs(batch, want_entropy)
        config = self._config
        bonus = config.entropy_weight > 0.0
        log_probs, entropies = self.log_probs(batch.answers, want_entropy=bonus)
        losses = policy_losses(log_probs, batch.log_probs, batch.advantages, config.clip)
        self.figures.add(
            policyLoss=losses.sum(),
            clipped=clipped(log_probs, batch.log_probs, batch.advantages, config.clip).sum(),
            updateKl=update_kl(log_probs, batch.log_probs).sum(),
        )
        if bonus:
            losses = losses - config.entropy_weight * entropies
        return scale * losses.sum()


class Critic(DecoderLoss):
    """A reward model that says at every token of an answer what the reward will be."""

    def __init__(self, model: nn.Module, clip: float | None, bias: float = 0.0) -> None:
        super().__init__(model)
        self._clip = clip
        self._bias = bias
        self.figures = Figures()

    @property
    def decoder(self) -> nn.Module:
        return decoder_of(self.model)

    def values(self, batch: AnswerBatch) -> Tensor:
        """Return what is expected in front of each token of the answers, fp32 [M]."""
        states = states_at(self.decoder, batch.tokens, batch.at, batch.last, self.positions_keyword)
        return self._bias + score_states(self.model, states)

    def forward(self, batch: ExperienceBatch | AnswerBatch, scale: float = 1.0) -> Tensor:
        """Return `scale` · the summed error of the answers' tokens; of plain answers, `values`."""
        if isinstance(batch, AnswerBatch):
            return self.values(batch)
        values = self.values(batch.answers)
        losses = value_losses(values, batch.values, batch.returns, self._clip)
        self.figures.add(valueLoss=losses.sum())
        return scale * losses.sum()


class PolicyObjective(UnpackedObjective):
    """The policy's side of an update."""

    def __init__(self, config: PolicyLoss, temperature: float) -> None:
        self._config = config
        self._temperature = temperature

    def module(self, model: nn.Module) -> DecoderLoss:
        return Policy(model, self._config, self._temperature)

    def collate(self, units: Sequence[Any]) -> MicroBatch:
        return collate(units)  # text beside the answers, and DeepSpeed's empty step

    def prove(self, module: Any, units: Sequence[Any], device: torch.device, dtype: torch.dtype) -> None:
        check_packing(module, units, device, dtype)  # of that text: answers are not packed


class CriticObjective(UnpackedObjective):
    """The critic's side of an update. `bias`: a constant that the critic adds to what its head says."""

    def __init__(self, clip: float | None, bias: float = 0.0) -> None:
        self._clip = clip
        self._bias = bias

    def module(self, model: nn.Module) -> DecoderLoss:
        return Critic(model, self._clip, self._bias)

    def collate(self, units: Sequence[Any]) -> MicroBatch:
        return collate_experiences(units, Whitening())
