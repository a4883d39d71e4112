"""What a training loop minimises. The loop knows steps, ranks and checkpoints; an objective knows units, batches and
the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import Unit
from stagecoach_trainer.engine.packing_check import check_packing
from stagecoach_trainer.kernels.causal import CausalLoss, DecoderLoss


class MicroBatch(Protocol):
    """Units as the loss module takes them."""

    @property
    def tokens(self) -> Tensor:
        """Token ids [B, T], padded on the right."""

    @property
    def num_targets(self) -> int:
        """What the sum of the losses is divided by, as far as it lies in this micro-batch."""

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""

    def pinned(self) -> Self:
        """Copy to page-locked memory, from which a GPU fetches while it computes."""


class Objective(Protocol):
    """Units to micro-batches, micro-batches to a loss."""

    def module(self, model: nn.Module) -> DecoderLoss:
        """Return a module that owns `model` (as its attribute `model`) and whose `forward(batch, scale)` is `scale` ·
        the summed loss of a micro-batch, an fp32 scalar. What uses the weight of the model's head without calling the
        head names it as its attribute `head`, so that ZeRO-3 gathers it, and has an attribute `through_module`, set
        where the head must be called after all."""

    def collate(self, units: Sequence[Any]) -> MicroBatch:
        """Lay out units as one micro-batch. Without any it is one token without loss, so that a rank without work
        still takes part in collective calls."""

    def prove(self, module: Any, units: Sequence[Unit], device: torch.device, dtype: torch.dtype) -> None:
        """Raise UserError where the model cannot be trained on the units of a step. Asked before every step, of the
        global batch; what has been proved need not be proved again."""


class LanguageModelling:
    """Next-token prediction on packed rows."""

    def module(self, model: nn.Module) -> DecoderLoss:
        return CausalLoss(model)

    def collate(self, units: Sequence[Any]) -> MicroBatch:
        return collate(units)

    def prove(self, module: Any, units: Sequence[Any], device: torch.device, dtype: torch.dtype) -> None:
        check_packing(module, units, device, dtype)


class UnpackedObjective:
    """Base of objectives without packed rows: there is nothing to prove."""

    def prove(self, module: Any, units: Sequence[Unit], device: torch.device, dtype: torch.dtype) -> None:
        del module, units, device, dtype
