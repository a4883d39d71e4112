"""The losses that an update minimises: the policy's clipped objective, and the critic's squared error.

M tokens of all answers of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stagecoach_api.kinds.ppo import PolicyLoss
from stagecoach_trainer.batches.collate import RowBatch, collate
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.engine.objective import NUM_PROVED, MicroBatch, UnpackedObjective
from stagecoach_trainer.engine.packing_check import check_packing
from stagecoach_trainer.kernels.answer_log_probs import AnswerBatch, AnswerModel, collate_answers
from stagecoach_trainer.kernels.causal import DecoderLoss
from stagecoach_trainer.kernels.unpadded import states_at
from stagecoach_trainer.losses.advantages import Whitening
from stagecoach_trainer.losses.policy import clipped, policy_losses, update_kl, value_losses
from stagecoach_trainer.models.reward import RewardModule, score_states
from stagecoach_trainer.ppo.experience import Experience, Floats


@dataclass(frozen=True)
class ExperienceBatch:
    """Experiences as one micro-batch. Each tensor holds one value per token of the answers, fp32 [M]."""

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
        moved = (item.to(device, non_blocking=True) for item in self._per_token())
        return ExperienceBatch(self.answers.to(device), *moved)

    def pinned(self) -> ExperienceBatch:
        return ExperienceBatch(self.answers.pinned(), *(item.pin_memory() for item in self._per_token()))

    def _per_token(self) -> tuple[Tensor, ...]:
        return self.log_probs, self.values, self.advantages, self.returns


def collate_experiences(chunk: Sequence[Experience], whitening: Whitening) -> ExperienceBatch:
    """Collate experiences as one micro-batch, with whitened advantages."""

    def joined(name: str) -> Floats:
        return np.concatenate([np.empty(0, np.float32), *(getattr(item, name) for item in chunk)])

    return ExperienceBatch(
        collate_answers([(item.prompt, item.answer) for item in chunk]),
        torch.from_numpy(joined("log_probs")),
        torch.from_numpy(joined("values")),
        torch.from_numpy(whitening.apply(joined("advantages"))),
        torch.from_numpy(joined("returns")),
    )


class TokenSums:
    """Sums over tokens that a loss module accumulates in its forward passes, for the metrics."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            # Tensors on the device: converting to float here would make every forward pass wait for the GPU.
            known = self._sums.get(name)
            self._sums[name] = value.detach().double() if known is None else known + value.detach().double()

    def take(self) -> dict[str, float]:
        """Return the sums since the last call."""
        taken, self._sums = self._sums, {}
        return {name: float(value) for name, value in taken.items()}


class PolicyModule(AnswerModel):
    """The language model as PPO trains it: log-probabilities and loss of answers, next-token loss of text."""

    def __init__(self, model: nn.Module, config: PolicyLoss, temperature: float) -> None:
        super().__init__(model)
        self._config = config
        self._temperature = temperature
        self.figures = TokenSums()

    def log_probs(self, batch: AnswerBatch, want_entropy: bool = True) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities [M] of the answers' tokens at the sampling temperature and, if wanted, the
        entropies [M], in nats, fp32."""
        return self.token_log_probs(batch, self._temperature, want_entropy)

    def forward(  # type: ignore[override]
        self,
        batch: RowBatch | ExperienceBatch | AnswerBatch | Callable[[], Tensor],
        scale: float = 1.0,
        want_entropy: bool = True,
    ) -> Any:
        """Return `scale` · the summed loss of text or experiences.

        For plain answers return `log_probs`; for a function, its result. Both go through the forward pass because
        ZeRO-3's hooks gather the parameters there.
        """
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
        # Recorded before the entropy bonus, so that `policyLoss` means the same with and without it.
        self.figures.add(
            policyLoss=losses.sum(),
            clipped=clipped(log_probs, batch.log_probs, batch.advantages, config.clip).sum(),
            updateKl=update_kl(log_probs, batch.log_probs).sum(),
        )
        if bonus:
            losses = losses - config.entropy_weight * entropies
        return scale * losses.sum()  # the engine divides: `scale` is 1 over the tokens of all ranks


class CriticModule(RewardModule):
    """A reward model that predicts the return at every token of an answer."""

    def __init__(self, model: nn.Module, clip: float | None, bias: float = 0.0) -> None:
        super().__init__(model)
        self._clip = clip
        self._bias = bias
        self.figures = TokenSums()

    def values(self, batch: AnswerBatch) -> Tensor:
        """Return the predicted return before each token of the answers, fp32 [M]."""
        states = states_at(self.decoder, batch.tokens, batch.at, batch.last, self.positions_keyword)
        return self._bias + score_states(self.model, states)

    def forward(self, batch: ExperienceBatch | AnswerBatch, scale: float = 1.0) -> Tensor:
        """Return `scale` · the summed loss of the answers' tokens; for plain answers, `values`."""
        if isinstance(batch, AnswerBatch):
            return self.values(batch)
        values = self.values(batch.answers)
        losses = value_losses(values, batch.values, batch.returns, self._clip)
        self.figures.add(valueLoss=losses.sum())
        return scale * losses.sum()


class PolicyObjective(UnpackedObjective):
    """The objective by which an engine trains the policy."""

    def __init__(self, config: PolicyLoss, temperature: float) -> None:
        self._config = config
        self._temperature = temperature

    def module(self, model: nn.Module) -> DecoderLoss:
        return PolicyModule(model, self._config, self._temperature)

    def collate(self, units: Sequence[Any]) -> MicroBatch:
        return collate(units)  # of text; experiences are collated by `collate_experiences`

    def samples(self, units: Sequence[Any]) -> Sequence[Ids]:
        """Return the ids of some prompts: of a policy's samples, only those are known before the first update."""
        return [prompt.ids for prompt in units[:NUM_PROVED]]

    def prove(self, module: Any, units: Sequence[Any], device: torch.device, dtype: torch.dtype) -> None:
        check_packing(module, units, device, dtype)  # only text is packed, answers are not


class CriticObjective(UnpackedObjective):
    """The objective by which an engine trains the critic. `bias`: a constant added to the head's output."""

    def __init__(self, clip: float | None, bias: float = 0.0) -> None:
        self._clip = clip
        self._bias = bias

    def module(self, model: nn.Module) -> DecoderLoss:
        return CriticModule(model, self._clip, self._bias)

    def collate(self, units: Sequence[Any]) -> MicroBatch:
        return collate_experiences(units, Whitening())
