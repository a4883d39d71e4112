"""The reference model: the frozen model that the KL penalty keeps the policy close to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stagecoach_api.training import Precision
from stagecoach_trainer.engine.precision import MixedPrecision
from stagecoach_trainer.kernels.answer_log_probs import AnswerBatch
from stagecoach_trainer.ppo.objectives import PolicyModule


class ReferenceModel(Protocol):
    """Computes the reference's log-probabilities."""

    def log_probs(self, batch: AnswerBatch) -> Tensor:
        """Return log-probabilities of the answers' tokens [M], in nats."""


@dataclass(frozen=True)
class SeparateReference:
    """A frozen model with its own weights."""

    module: PolicyModule

    def log_probs(self, batch: AnswerBatch) -> Tensor:
        log_probs: Tensor = self.module(batch, want_entropy=False)[0]
        return log_probs


@dataclass(frozen=True)
class PolicyWithoutAdapter:
    """The policy with its adapter disabled: one copy of the base weights serves both."""

    policy: nn.Module

    def log_probs(self, batch: AnswerBatch) -> Tensor:
        with self._adapter_disabled():
            log_probs: Tensor = self.policy(batch, want_entropy=False)[0]
        return log_probs

    @contextmanager
    def _adapter_disabled(self) -> Iterator[None]:
        model: Any = self.policy.model
        with model.disable_adapter():
            yield


def freeze(model: Any, precision: Precision, device: torch.device) -> Any:
    """Move an inference-only model to `device` and return it, computing as the plain engine does.

    Equal weights then give equal log-probabilities, and the KL to an equal policy is exactly 0.
    """
    model.requires_grad_(False)
    MixedPrecision(model, precision).cast(device)
    return model.eval()
