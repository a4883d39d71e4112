"""The engine protocol: gradients and optimiser steps, as the loops use them. Two engines: plain and sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stagecoach_trainer.engine.objective import MicroBatch
from stagecoach_trainer.kernels.causal import DecoderLoss

MASTER = "master/"
MOMENT_1 = "exp_avg/"
MOMENT_2 = "exp_avg_sq/"


@dataclass(frozen=True)
class StepReport:
    """The outcome of an optimiser step."""

    gradient_norm: float
    """Global L2 norm before clipping."""

    skipped: bool = False
    """fp16 only: the gradients overflowed, so the loss scale alone was changed."""


@dataclass(frozen=True)
class EngineState:
    """The training state an engine keeps. Its tensors are full (not sharded), fp32, on the CPU."""

    tensors: Mapping[str, Tensor]
    """`master/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>` of every trained parameter. Empty on ranks other than
    0."""

    num_steps: int
    """Steps the optimiser has made, except skipped ones."""

    loss_scale: float = 1.0
    good_steps: int = 0
    """Steps without overflow since the last change of the loss scale."""


class Engine(Protocol):
    """Computes gradients and makes optimiser steps. Every method must be called on all ranks at the same time."""

    device: torch.device
    loss: DecoderLoss
    """The objective's module around the model."""
    dtype: torch.dtype
    """The dtype in which the model computes."""

    def accumulate(self, batch: MicroBatch, scale: float, last: bool) -> Tensor:
        """Run the forward and backward pass of a micro-batch; return `scale` · its summed loss on this rank, detached.

        `scale`: 1 / targets in the global batch. `last`: whether it is the step's last micro-batch.
        """

    def step(self, learning_rate: float) -> StepReport:
        """Clip the gradients accumulated since the last step, and make an optimiser step."""

    def state(self) -> EngineState:
        """Return a copy of the training state that later steps do not change."""

    def load_state(self, state: EngineState) -> None:
        """Restore a training state; every rank passes all tensors."""

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and full fp32 weight of every trained parameter on rank 0, nothing on others, which must iterate
        too."""

    def finish(self) -> None:
        """Put the final fp32 weights into the model, on the CPU of rank 0; the engine cannot be used afterwards."""
