"""Held-out loss of rows: nats per token, bits per character, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.batches.shard import shard_batch
from stagecoach_trainer.engine.objective import NUM_PROVED
from stagecoach_trainer.engine.packing_check import computed_in, samples_apart
from stagecoach_trainer.kernels.accelerate import prove_head
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.runtime.context import World

DEFAULT_MEASURE_ROWS = 8
LARGEST_EXPONENT = 709.0
"""Largest whole exponent for which `exp` does not overflow."""


@dataclass(frozen=True)
class LossSum:
    """The loss of a set of rows, as a sum and its divisor."""

    nll: float
    """Summed negative log-likelihood in nats."""

    tokens: int
    """Positions with loss."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token; infinite if it exceeds the range of a float."""
        return math.exp(self.loss) if self.loss < LARGEST_EXPONENT else math.inf

    def bits_per_character(self, characters: int) -> float:
        return self.nll / math.log(2.0) / characters


def measure(
    model: nn.Module,
    rows: Sequence[Row],
    batch_rows: int = DEFAULT_MEASURE_ROWS,
    dtype: torch.dtype | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> LossSum:
    """Measure a model on rows, on one rank, without dropout, after it was proved on some of them.

    `dtype`: the dtype of autocast; None or fp32 for no autocast. `report(done, total)` is called after each
    micro-batch. Raises UserError for a model whose loss is not that of transformers.
    """
    device = next(model.parameters()).device
    autocast = nullcontext() if dtype in (None, torch.float32) else torch.autocast(device.type, dtype)
    with autocast:
        loss = CausalLoss(model)
        prove_head(loss, device, computed_in(loss, device), [row.tokens for row in rows[:NUM_PROVED]])
        return measure_with(loss, rows, batch_rows, device, World(), report)


def measure_with(
    loss: CausalLoss,
    rows: Sequence[Row],
    batch_rows: int,
    device: torch.device,
    world: World,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> LossSum:
    """Measure with a loss module, the rows divided among the ranks; every rank returns the sum over all.

    Packed rows are split into samples if the model's attention leaks between them. `report(done, total)` is called
    after each micro-batch.
    """
    own = shard_batch(samples_apart(loss, rows, device), batch_rows, world.rank, world.size)
    was_training = loss.training
    loss.eval()
    total = torch.zeros((), dtype=torch.float64)
    try:
        with torch.no_grad():
            for index, micro_batch in enumerate(own.micro_batches):
                total += loss(collate(micro_batch).to(device), 1.0).double().cpu()
                report(index + 1, len(own.micro_batches))
    finally:
        loss.train(was_training)
    if world.size > 1:
        dist.all_reduce(total)
    return LossSum(float(total), own.num_targets)
