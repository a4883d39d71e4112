"""Rows of different lengths: one behind the other without padding, and back.

B rows, T tokens of the longest, N tokens in all, H heads, C width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class RaggedRows:
    """Which token stands where in padded rows."""

    places: Tensor
    """Place of each token in the flattened [B · T], ascending [N]."""

    tokens: Tensor
    """Which of the N tokens stands at each place [B · T]; behind a row's end, any."""

    shape: tuple[int, int]
    """B and T."""

    @classmethod
    def ending_at(cls, last: Tensor, length: int) -> RaggedRows:
        """Return rows padded to `length` whose last tokens stand at `last` [B] of each."""
        filled = (torch.arange(length, device=last.device) <= last[:, None]).flatten()
        return cls(filled.nonzero()[:, 0], filled.cumsum(0) - 1, (len(last), length))

    def spread(self, x: Tensor) -> Tensor:
        """Return `x` [1, H, N, C] in padded rows [H · B, T, C], with finite numbers for padding."""
        spread: Tensor = _Spread.apply(x[0], self.places, self.tokens)  # type: ignore[no-untyped-call]
        return spread.view(-1, self.shape[1], x.shape[-1])

    def collect(self, x: Tensor) -> Tensor:
        """Return `x` [H · B, T, C] without padding: [1, N, H, C]."""
        flat = x.reshape(-1, len(self.tokens), x.shape[-1])
        collected: Tensor = _Collect.apply(flat, self.places)  # type: ignore[no-untyped-call]
        return collected.transpose(0, 1).contiguous()[None]


class _Spread(torch.autograd.Function):
    """[H, N, C] -> [H, B · T, C]. Padding must not be looked at: no gradient comes back from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(1, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return d_out.index_select(1, places), None, None


class _Collect(torch.autograd.Function):
    """[H, B · T, C] -> [H, N, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = x.shape
        return x.index_select(1, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return d_out.new_zeros(ctx.size).index_copy_(1, places, d_out), None
