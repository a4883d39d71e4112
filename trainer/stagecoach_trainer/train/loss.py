"""Cross-entropy over a large vocabulary without ever holding all logits.

Only positions with loss get logits, a chunk of them at a time, and the gradient is computed in the forward pass while
the chunk's logits are there; backward only scales it. The idea is that of Cut Cross-Entropy (arXiv 2411.09009) and of
Liger's fused linear cross-entropy, in plain PyTorch.

N positions of the batch (B · T), M of them with loss, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits held at once, by device: 8 MiB in fp32, which a processor's cache holds; 256 MiB on a GPU."""


def chunk_rows(vocabulary: int, device: torch.device, chunk_elements: int | None = None) -> int:
    """Return how many positions are computed at once."""
    return max(16, (chunk_elements or CHUNK_ELEMENTS[device.type]) // vocabulary)


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    loss_at: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    chunk_elements: int | None = None,
) -> Tensor:
    """Return `scale` · Σ −log p(target) over the positions with loss, in nats, as an fp32 scalar.

    `hidden` [N, D], `weight` [V, D] of the head (cast to the dtype of `hidden` where it differs; its gradient then has
    its own dtype), `loss_at` [M], `targets` [M]. Softmax and sums over V are in fp32, the sum over positions in fp64. Gradients flow to `hidden`, `weight`
    and `bias` where they are asked for.
    """
    wanted = torch.is_grad_enabled()
    result: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, loss_at, targets, scale, wanted, chunk_rows(len(weight), hidden.device, chunk_elements)
    )
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_at: Tensor,
        targets: Tensor,
        scale: float,
        wanted: bool,
        rows: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = (wanted and needed for needed in ctx.needs_input_grad[:3])
        head = weight.to(hidden.dtype)
        everywhere = len(loss_at) == len(hidden)
        selected = hidden if everywhere else hidden.index_select(0, loss_at)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        minus_one = torch.full((len(targets), 1), -1.0, device=hidden.device)
        d_selected = torch.empty_like(selected) if need_hidden else None
        d_weight = _zeros_like(weight) if need_weight else None
        d_bias = _zeros_like(bias) if need_bias and bias is not None else None
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = selected[part] @ head.T
            if bias is not None:
                logits += bias
            p, nll = _softmax_and_nll(logits.float(), targets[part, None])
            total += nll
            if not (need_hidden or need_weight or need_bias):
                continue
            d_logits = p.scatter_add_(1, targets[part, None], minus_one[part])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            small = d_logits.to(hidden.dtype)
            if d_selected is not None:
                torch.mm(small, head, out=d_selected[part])
            if d_weight is not None:
                d_weight += small.T @ selected[part]
        ctx.scale = scale
        ctx.everywhere = everywhere
        ctx.hidden_shape = hidden.shape
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(loss_at, d_selected, d_weight, d_bias)
        return (total * scale).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        loss_at, d_selected, d_weight, d_bias = ctx.saved_tensors
        factor = d_output * ctx.scale
        d_hidden = None
        if d_selected is not None:
            d_selected.mul_(factor)
            d_hidden = d_selected
            if not ctx.everywhere:
                d_hidden = d_selected.new_zeros(ctx.hidden_shape)
                d_hidden.index_copy_(0, loss_at, d_selected)
        weight_dtype, bias_dtype = ctx.dtypes
        if d_weight is not None:
            d_weight = d_weight.mul_(factor).to(weight_dtype)
        if d_bias is not None:
            d_bias = d_bias.mul_(factor).to(bias_dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _softmax_and_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax of fp32 logits [rows, V], and the summed −log p of the targets [rows, 1] in fp64.

    The log of the normaliser is taken from the most probable token, whose probability never underflows: softmax is one
    fast kernel, where exponentials of a log-softmax cost three times as much on a CPU.
    """
    p = torch.softmax(logits, dim=-1)
    normaliser = logits.amax(-1) - p.amax(-1).log_()
    nll = (normaliser - logits.gather(1, targets)[:, 0]).sum(dtype=torch.float64)
    return p, nll


def _zeros_like(parameter: Tensor) -> Tensor:
    """Return where a gradient is summed up in fp32 over the chunks."""
    return torch.zeros_like(parameter, dtype=torch.float32)


def cross_entropy_sum_through(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    loss_at: Tensor,
    targets: Tensor,
    vocabulary: int,
    scale: float = 1.0,
    chunk_elements: int | None = None,
) -> Tensor:
    """Like `cross_entropy_sum` for a head that is more than a matrix, such as one with an adapter.

    Each chunk's logits are made by calling `head` on [rows, D], thrown away, and made again in the backward pass.
    """

    def chunk_sum(part: Tensor, target: Tensor) -> Tensor:
        logits = head(part).float()
        return torch.nn.functional.cross_entropy(logits, target, reduction="sum")

    selected = hidden.index_select(0, loss_at)
    rows = chunk_rows(vocabulary, hidden.device, chunk_elements)
    total = selected.new_zeros((), dtype=torch.float32) + 0.0 * selected.sum()  # connected even where M = 0
    for start in range(0, len(targets), rows):
        part, target = selected[start : start + rows], targets[start : start + rows]
        if torch.is_grad_enabled():
            total = total + checkpoint(chunk_sum, part, target, use_reentrant=False)
        else:
            total = total + chunk_sum(part, target)
    return total * scale
