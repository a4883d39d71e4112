"""Log-probability and entropy of single tokens over a large vocabulary, without holding all logits at once.

As in `cross_entropy`, positions are processed in chunks. But each token has its own upstream gradient, known only in
the backward pass, so a chunk's logits are discarded and recomputed there.

N positions of the batch (B · T), M requested positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from stagecoach_trainer.kernels.cross_entropy import HeadGradient, Scratch, chunk_rows


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    at: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    want_entropy: bool = False,
    chunk_elements: int | None = None,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log p(target) [M] and the entropy of p [M], in nats, with p = softmax(logits / temperature).

    `hidden` [N, D], `weight` [V, D] of the head (cast to the dtype of `hidden`; its gradient has its own dtype), `at`
    [M], distinct positions, `targets` [M]. Softmax and results are fp32 (fp64 for fp64 states). Without `want_entropy`
    the entropies are empty [0], so that their mean is NaN rather than a wrong number. Gradients of both results flow to
    those of `hidden`, `weight` and `bias` that require them. `scratch`: memory kept between calls.
    """
    rows = chunk_rows(len(weight), hidden.device, chunk_elements)
    log_probs, entropies = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, at, targets, temperature, want_entropy, rows, scratch or Scratch()
    )
    return log_probs, entropies


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        at: Tensor,
        targets: Tensor,
        temperature: float,
        want_entropy: bool,
        rows: int,
        scratch: Scratch,
    ) -> tuple[Tensor, Tensor]:
        chunks = _Chunks(hidden, weight, bias, at, temperature, rows, scratch)
        log_probs = hidden.new_empty(len(targets), dtype=chunks.dtype)
        entropies = hidden.new_empty(len(targets) if want_entropy else 0, dtype=chunks.dtype)
        for part in chunks.parts():
            p, logits, normaliser = chunks.softmax(part)
            torch.sub(logits.gather(1, targets[part, None])[:, 0], normaliser, out=log_probs[part])
            if want_entropy:  # −Σ p (logit − normaliser), where Σ p = 1
                # Overwrites the logits, so the targets' are gathered first.
                torch.sub(normaliser, logits.mul_(p).sum(-1), out=entropies[part])
        # The weight itself, not its copy in another dtype: ZeRO-3 frees it after forward and gathers it for backward.
        ctx.save_for_backward(hidden, weight, bias, at, targets, entropies)
        ctx.settings = temperature, want_entropy, rows, scratch
        if not want_entropy:
            ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_probs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, at, targets, entropies = ctx.saved_tensors
        temperature, want_entropy, rows, scratch = ctx.settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        chunks = _Chunks(hidden, weight, bias, at, temperature, rows, scratch)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = HeadGradient(weight, chunks.selected, rows, scratch) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=chunks.dtype) if need_bias else None
        for part in chunks.parts():
            factor = d_log_probs[part] / -temperature
            p, logits, normaliser = chunks.softmax(part)
            if want_entropy:
                # d log p(target) / d logits = one_hot − p;  d entropy / d logits = −p (log p + entropy)
                log_p_and_entropy = logits.sub_((normaliser - entropies[part])[:, None])
                d_logits = log_p_and_entropy.mul_((d_entropies[part] / -temperature)[:, None])
                d_logits.add_(factor[:, None]).mul_(p)
            else:
                d_logits = p.mul_(factor[:, None])
            d_logits.scatter_add_(1, targets[part, None], -factor[:, None])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            small = d_weight.room(part) if d_weight is not None else chunks.small(part)
            small.copy_(d_logits)
            if d_hidden is not None:
                # Positions are distinct, so every row is written once, without an addition in the states' dtype.
                d_hidden.index_copy_(0, at[part], torch.mm(small, chunks.head))
            if d_weight is not None:
                d_weight.collect(part)
        d_head = None if d_weight is None else d_weight.total().to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_head, d_bias, None, None, None, None, None, None


class _Chunks:
    """Chunks of the requested positions, and the softmax of each, in memory that the next chunk reuses."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        at: Tensor,
        temperature: float,
        rows: int,
        scratch: Scratch,
    ) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        """Dtype of softmax, results and sums."""
        self.head = weight
        """The head's weight [V, D] in the dtype of the states."""
        if weight.dtype is not hidden.dtype:
            self.head = scratch.empty("head", weight.shape, like=hidden).copy_(weight)
        self.selected = hidden.index_select(0, at)
        """The requested states [M, D]."""
        self._bias = bias
        self._temperature = temperature
        self._rows = rows
        shape = min(rows, len(at)), len(weight)
        self._small = scratch.empty("small", shape, like=hidden)
        low = hidden.dtype is not self.dtype
        self._large = scratch.empty("large", shape, like=hidden, dtype=self.dtype) if low else self._small
        self._p = scratch.empty("p", shape, like=hidden, dtype=self.dtype)

    def parts(self) -> Iterator[slice]:
        """Yield the chunks as slices of the M positions."""
        for start in range(0, len(self.selected), self._rows):
            yield slice(start, min(start + self._rows, len(self.selected)))

    def softmax(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return a chunk's p [rows, V], its logits [rows, V], shifted so that the largest is 0, and log normaliser
        [rows].

        The log normaliser is computed from the most probable token, whose probability never underflows.
        """
        rows = part.stop - part.start
        small = torch.mm(self.selected[part], self.head.T, out=self._small[:rows])
        logits = small if self._large is self._small else self._large[:rows].copy_(small)
        if self._bias is not None:
            logits += self._bias
        if self._temperature != 1.0:
            logits /= self._temperature
        logits -= logits.amax(-1, keepdim=True)
        p = torch.softmax(logits, dim=-1, out=self._p[:rows])
        return p, logits, -p.amax(-1).log_()  # max(p) = exp(0 − log Z)

    def small(self, part: slice) -> Tensor:
        """Return the memory for a chunk's logits in the dtype of the states [rows, V]."""
        return self._small[: part.stop - part.start]


def token_log_probs_through(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    at: Tensor,
    targets: Tensor,
    vocabulary: int,
    temperature: float = 1.0,
    want_entropy: bool = False,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `token_log_probs`, for a head that is more than a matrix, such as one with an adapter.

    Each chunk's logits are computed by calling `head` on [rows, D], discarded, and recomputed in the backward pass.
    """
    selected = hidden.index_select(0, at)
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def chunk(part: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(head(part).to(dtype) / temperature, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1) if want_entropy else log_p.new_empty(0)
        return log_p.gather(1, target[:, None])[:, 0], entropy

    rows = chunk_rows(vocabulary, hidden.device, chunk_elements)
    nothing = 0.0 * selected[:0].to(dtype).sum(-1)  # [0]; keeps the graph connected if M = 0
    log_probs, entropies = [nothing], [nothing]
    for start in range(0, len(targets), rows):
        part, target = selected[start : start + rows], targets[start : start + rows]
        again = torch.is_grad_enabled()
        some = checkpoint(chunk, part, target, use_reentrant=False) if again else chunk(part, target)
        log_probs.append(some[0])
        entropies.append(some[1])
    return torch.cat(log_probs), torch.cat(entropies)
