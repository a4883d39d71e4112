"""Cross-entropy over a large vocabulary without holding all logits at once.

Only positions with loss get logits, a chunk of them at a time. The forward pass computes the gradient while a chunk's
logits exist; the backward pass only scales it. The idea is that of Cut Cross-Entropy (arXiv 2411.09009) and of Liger's
fused linear cross-entropy (arXiv 2410.10989), in plain PyTorch.

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
"""Logits held at once, by device type: 8 MiB in fp32, which fits a processor's cache; 256 MiB on a GPU."""


def chunk_rows(vocabulary: int, device: torch.device, chunk_elements: int | None = None) -> int:
    """Return the number of positions in a chunk, at least 16."""
    return max(16, (chunk_elements or CHUNK_ELEMENTS[device.type]) // vocabulary)


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    loss_at: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    chunk_elements: int | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return `scale` · Σ −log p(target) over the positions with loss, in nats, as an fp32 scalar.

    `hidden` [N, D], `weight` [V, D] of the head (cast to the dtype of `hidden`; its gradient has its own dtype),
    `loss_at` [M], `targets` [M]. Softmax and sums over V are in fp32, the sum over positions in fp64. Gradients flow to
    those of `hidden`, `weight` and `bias` that require them. `scratch`: memory kept between calls.
    """
    wanted = torch.is_grad_enabled()
    rows = chunk_rows(len(weight), hidden.device, chunk_elements)
    result: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, loss_at, targets, scale, wanted, rows, scratch or Scratch()
    )
    return result


class Scratch:
    """Named tensors that later calls reuse: on a CPU, fresh memory costs as much time as the computation in it.

    On a GPU nothing is kept, since PyTorch's allocator caches memory there.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor in the dtype (or `dtype`) and on the device of `like`."""
        kept = self._kept.get(name)
        dtype = dtype or like.dtype
        fits = kept is not None and kept.shape[1:] == shape[1:] and len(kept) >= shape[0] and kept.dtype is dtype
        if kept is None or not fits or kept.device != like.device:
            kept = like.new_empty(shape, dtype=dtype)
            if like.device.type == "cpu":
                self._kept[name] = kept
        return kept[: shape[0]]


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
        scratch: Scratch,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = (wanted and needed for needed in ctx.needs_input_grad[:3])
        head = weight
        if weight.dtype is not hidden.dtype:
            head = scratch.empty("head", weight.shape, like=hidden).copy_(weight)
        everywhere = len(loss_at) == len(hidden)  # `loss_at` is ascending, so then it selects nothing new
        selected = hidden if everywhere else hidden.index_select(0, loss_at)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)  # a sum over thousands of positions
        d_selected = torch.empty_like(selected) if need_hidden else None
        d_weight = HeadGradient(weight, selected, rows, scratch) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        room = _Room(min(rows, len(targets)), head, scratch)
        for start in range(0, len(targets), rows):
            part = slice(start, min(start + rows, len(targets)))
            logits = room.logits(selected[part], bias)
            p, nll = _softmax_and_nll(logits, targets[part, None], room)
            total += nll
            if not (need_hidden or need_weight or need_bias):
                continue
            p.scatter_add_(1, targets[part, None], room.minus_one[: len(p)])  # d loss / d logits = p − one_hot(target)
            if d_bias is not None:
                d_bias += p.sum(0)
            # Written straight into the block from which the weight's gradient is computed, which saves a copy.
            small = d_weight.room(part) if d_weight is not None else room.small[: len(p)]
            small.copy_(p)  # to the compute dtype, in which the products below are computed
            if d_selected is not None:
                torch.mm(small, head, out=d_selected[part])
            if d_weight is not None:
                d_weight.collect(part)
        # The loss is linear in its upstream gradient, so the backward pass only multiplies what is saved here.
        ctx.scale = scale
        ctx.everywhere = everywhere
        ctx.hidden_shape = hidden.shape
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(loss_at, d_selected, None if d_weight is None else d_weight.total(), d_bias)
        return (total * scale).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        loss_at, d_selected, d_weight, d_bias = ctx.saved_tensors
        factor = d_output * ctx.scale
        d_hidden = None
        if d_selected is not None:
            # In place, which saves a copy: nothing else holds these tensors, and a loss is backpropagated once.
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
        return d_hidden, d_weight, d_bias, None, None, None, None, None, None


class _Room:
    """Memory for one chunk, reused by the next."""

    def __init__(self, rows: int, head: Tensor, scratch: Scratch) -> None:
        self._head = head
        shape = rows, len(head)
        self.small = scratch.empty("small", shape, like=head)
        low = head.dtype is not torch.float32
        self._large = scratch.empty("large", shape, like=head, dtype=torch.float32) if low else None
        self.p = scratch.empty("p", shape, like=head, dtype=torch.float32)
        self.minus_one = torch.full((rows, 1), -1.0, device=head.device)

    def logits(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits of states [rows, D] in fp32 [rows, V]."""
        rows = len(states)
        logits = torch.mm(states, self._head.T, out=self.small[:rows])
        if bias is not None:
            logits += bias
        return logits if self._large is None else self._large[:rows].copy_(logits)


class HeadGradient:
    """The gradient of the head's weight [V, D], summed over blocks of chunks in fp32 (fp64 for fp64 states).

    A block's logit gradients are kept in the compute dtype until one product sums them: adding to a whole [V, D] after
    each chunk would take a tenth of the loss's time.
    """

    CHUNKS_PER_BLOCK = 4

    def __init__(self, weight: Tensor, selected: Tensor, rows: int, scratch: Scratch) -> None:
        self._weight = weight
        self._selected = selected
        self._dtype = torch.promote_types(selected.dtype, torch.float32)
        self._block_rows = rows * self.CHUNKS_PER_BLOCK
        self._block = scratch.empty("block", (min(self._block_rows, len(selected)), len(weight)), like=selected)
        self._term = scratch.empty("term", weight.shape, like=selected)
        self._sum: Tensor | None = None

    def room(self, part: slice) -> Tensor:
        """Return the memory to write the gradient of a chunk's logits to [rows, V]."""
        start = part.start % self._block_rows
        return self._block[start : start + part.stop - part.start]

    def collect(self, part: slice) -> None:
        """Add the chunk written last to the sum, if it completes a block."""
        if part.stop % self._block_rows and part.stop != len(self._selected):
            return
        start = part.start - part.start % self._block_rows
        term = torch.mm(self._block[: part.stop - start].T, self._selected[start : part.stop], out=self._term)
        if self._sum is None:
            # A copy even in the same dtype: `term` is scratch memory, which the next block overwrites.
            self._sum = term.to(self._dtype, copy=True)
        else:
            self._sum += term

    def total(self) -> Tensor:
        """Return the sum [V, D]; zeros if there was no chunk."""
        if self._sum is None:
            return torch.zeros_like(self._weight, dtype=self._dtype)
        return self._sum


def _softmax_and_nll(logits: Tensor, targets: Tensor, room: _Room) -> tuple[Tensor, Tensor]:
    """Return the softmax of fp32 logits [rows, V], and the summed −log p of the targets [rows, 1] in fp64.

    log Z = max(logits) − log max(p), computed from the most probable token because its probability never underflows.
    Softmax is one fast kernel; the exponentials of a log-softmax take three times as long on a CPU.
    """
    p = torch.softmax(logits, dim=-1, out=room.p[: len(logits)])
    normaliser = logits.amax(-1) - p.amax(-1).log_()
    nll = (normaliser - logits.gather(1, targets)[:, 0]).sum(dtype=torch.float64)
    return p, nll


def cross_entropy_sum_through(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    loss_at: Tensor,
    targets: Tensor,
    vocabulary: int,
    scale: float = 1.0,
    chunk_elements: int | None = None,
) -> Tensor:
    """Like `cross_entropy_sum`, for a head that is more than a matrix, such as one with an adapter.

    Each chunk's logits are computed by calling `head` on [rows, D], discarded, and recomputed in the backward pass.
    """

    def chunk_sum(part: Tensor, target: Tensor) -> Tensor:
        logits = head(part).float()
        return torch.nn.functional.cross_entropy(logits, target, reduction="sum")

    selected = hidden.index_select(0, loss_at)
    rows = chunk_rows(vocabulary, hidden.device, chunk_elements)
    total = selected.new_zeros((), dtype=torch.float32) + 0.0 * selected.sum()  # keeps the graph connected if M = 0
    for start in range(0, len(targets), rows):
        part, target = selected[start : start + rows], targets[start : start + rows]
        if torch.is_grad_enabled():
            total = total + checkpoint(chunk_sum, part, target, use_reentrant=False)
        else:
            total = total + chunk_sum(part, target)
    return total * scale
