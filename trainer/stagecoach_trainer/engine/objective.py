"""Objectives: what a training loop minimises. A loop handles steps, ranks and checkpoints; an objective handles units,
batches and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import Ids, Unit
from stagecoach_trainer.engine.packing_check import check_packing
from stagecoach_trainer.kernels.causal import CausalLoss, DecoderLoss

NUM_PROVED = 8
"""Units from whose samples those are chosen on which a model is proved."""


class MicroBatch(Protocol):
    """Units as input of the loss module."""

    @property
    def tokens(self) -> Tensor:
        """Token ids [B, T], padded on the right."""

    @property
    def num_targets(self) -> int:
        """This micro-batch's part of the divisor of the summed loss."""

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""

    def pinned(self) -> Self:
        """Copy to page-locked memory, from which a GPU copies while it computes."""


class Objective(Protocol):
    """Turns units into micro-batches, and micro-batches into a loss."""

    def module(self, model: nn.Module) -> DecoderLoss:
        """Return a module that owns `model` and whose `forward(batch, scale)` returns `scale` · the summed loss of a
        micro-batch, an fp32 scalar.

        A module that uses the weight of the model's head without calling the head has it as attribute `head`, so that
        ZeRO-3 gathers it, and an attribute `through_module`, which is set if the head must be called instead.
        """

    def collate(self, units: Sequence[Any]) -> MicroBatch:
        """Return units as one micro-batch. Without units it is one token without loss, so that a rank without work
        still takes part in collective calls."""

    def samples(self, units: Sequence[Any]) -> Sequence[Ids]:
        """Return the token ids of some of the units' samples: the model is proved on them (`kernels.proof`)."""

    def prove(self, module: Any, units: Sequence[Unit], device: torch.device, dtype: torch.dtype) -> None:
        """Raise UserError if the model cannot be trained on the units of a step.

        Called before every step with the global batch; a property of the model need be proved only once.
        """


class LanguageModelling:
    """Next-token prediction on packed rows."""

    def module(self, model: nn.Module) -> DecoderLoss:
        return CausalLoss(model)

    def collate(self, units: Sequence[Any]) -> MicroBatch:
        return collate(units)

    def samples(self, units: Sequence[Any]) -> Sequence[Ids]:
        return [sample.tokens for row in units[:NUM_PROVED] for sample in row.samples()]

    def prove(self, module: Any, units: Sequence[Any], device: torch.device, dtype: torch.dtype) -> None:
        check_packing(module, units, device, dtype)


class UnpackedObjective:
    """Base of objectives without packed rows: there is nothing to prove of a step."""

    def samples(self, units: Sequence[Any]) -> Sequence[Ids]:
        """Return nothing: the model is proved on ids of its vocabulary."""
        del units
        return ()

    def prove(self, module: Any, units: Sequence[Unit], device: torch.device, dtype: torch.dtype) -> None:
        del module, units, device, dtype
