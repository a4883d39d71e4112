"""Gradients of a loss module on a few short rows, of which fast paths must give those of transformers.

A fast path may have a backward pass of its own, and the loss does not show whether it is right. What every backward
pass hands on reaches the embedding's output, where its sums over groups of ids are compared; what it computes itself
are gradients of parameters with one dimension, such as those of norms, and of a head that is not large.

K predicted positions, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_trainer.kernels.causal import DecoderLoss, causal_model, output_layer
from stagecoach_trainer.kernels.proof_rows import ProofRows

GROUPS = 16
"""Groups of ids, by their remainder, whose gradients are summed: the shape is then that of no batch."""

LARGEST_HEAD = 2**22
"""Numbers up to which a head's gradient is compared; it would take as much memory as the head."""

SMALLEST = 0.02
"""Norm of a gradient, relative to the largest, below which its difference is relative to this: the bias of keys has a
gradient of rounding alone."""

INPUTS = "the embedding's output"

Gradients = Mapping[str, Tensor]


def has_gradients(loss: DecoderLoss) -> bool:
    """Return whether a module is trained, and its parameters are whole on this rank (not those of ZeRO-3)."""
    parameters = list(loss.parameters())
    return any(item.requires_grad for item in parameters) and not any(hasattr(item, "ds_id") for item in parameters)


def gradients_of(loss: DecoderLoss, compute: Callable[[ProofRows], Tensor], rows: ProofRows) -> Gradients:
    """Return the gradients of a weighted sum of the figures [K] that `compute` returns, in fp32 on the CPU by name.

    They are not added to those of the parameters. Empty if the figures have no gradient.
    """
    chosen = _chosen(loss)
    with torch.enable_grad(), _probed(loss) as inputs:
        figures = compute(rows).float()
        if not figures.requires_grad:
            return {}
        total = (figures * torch.linspace(1.0, 2.0, len(figures), device=figures.device)).mean()
        wanted = {**chosen, INPUTS: inputs}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {name: item.detach().float().cpu() for name, item in zip(wanted, found, strict=True) if item is not None}


def largest_difference(expected: Gradients, got: Gradients) -> tuple[float, str]:
    """Return the largest difference of two gradients relative to the norm of the first, and its name.

    Infinite for one that is missing or not finite.
    """
    largest = max((float(item.norm()) for item in expected.values()), default=0.0)
    worst = (0.0, INPUTS)
    for name, item in expected.items():
        other = got.get(name)
        if other is None or other.shape != item.shape or not bool(other.isfinite().all()):
            return float("inf"), name
        difference = float((other - item).norm()) / max(float(item.norm()), SMALLEST * largest, 1e-30)
        worst = max(worst, (difference, name))
    return worst


def _chosen(loss: DecoderLoss) -> dict[str, nn.Parameter]:
    head: Any = getattr(output_layer(loss.model), "weight", None)
    return {
        name: item
        for name, item in loss.model.named_parameters()
        if item.requires_grad and (item.ndim == 1 or (item is head and item.numel() <= LARGEST_HEAD))
    }


@contextmanager
def _probed(loss: DecoderLoss) -> Iterator[Tensor]:
    """Add zeros to the embedding's output, one row [D] for each group of ids; their gradient is that of the output."""
    embedding = causal_model(loss.model).get_input_embeddings()
    weight = embedding.weight
    zeros = torch.zeros(GROUPS, weight.shape[-1], device=weight.device, requires_grad=True)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del module
        return output + zeros[inputs[0] % GROUPS].to(output.dtype)

    hook = embedding.register_forward_hook(add)
    try:
        yield zeros
    finally:
        hook.remove()
