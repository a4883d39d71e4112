"""The engine protocol: what the loop asks of whoever computes gradients and steps. Two engines: plain and sharded."""

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
    """What an optimiser step came to."""

    gradient_norm: float
    """Global L2 norm before clipping."""

    skipped: bool = False
    """fp16 only: the gradients overflowed, and nothing was changed but the loss scale."""


@dataclass(frozen=True)
class EngineState:
    """The training state an engine keeps. Its tensors are full (not sharded), fp32, on the CPU."""

    tensors: Mapping[str, Tensor]
    """`master/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>` of every trained parameter; rank 0 only, empty
    elsewhere."""

    num_steps: int
    """Steps the optimiser has made, skipped ones apart."""

    loss_scale: float = 1.0
    good_steps: int = 0
    """Steps without overflow since the loss scale was changed last."""


class Engine(Protocol):
    """Computes gradients and makes optimiser steps. Every method is called on all ranks at the same time."""

    device: torch.device
    loss: DecoderLoss
    """The objective's module around the model."""
    dtype: torch.dtype

    def accumulate(self, batch: MicroBatch, scale: float, last: bool) -> Tensor:
        """Run forward and backward of a micro-batch; return `scale` · its summed loss, this rank's part, detached.

        `scale`: 1 / targets in the global batch. `last`: it is the step's last micro-batch.
        """

    def step(self, learning_rate: float) -> StepReport:
        """Clip and make an optimiser step with the gradients accumulated since the last one."""

    def state(self) -> EngineState:
        """Return a copy of the training state that later steps leave alone."""

    def load_state(self, state: EngineState) -> None:
        """Take up a training state: on every rank, with all tensors."""

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and whole fp32 weight of every trained parameter: on rank 0 only, though all ranks must ask."""

    def finish(self) -> None:
        """Leave the final fp32 weights in the model, on the CPU, on rank 0; the engine is of no use afterwards."""
