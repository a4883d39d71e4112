"""Rows of different lengths: concatenated without padding, and back.

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
    """The mapping between padded rows and their concatenated tokens."""

    places: Tensor
    """Index of each token in the flattened [B · T], ascending [N]."""

    tokens: Tensor
    """Index of the token at each place [B · T]; arbitrary after a row's end."""

    shape: tuple[int, int]
    """B and T."""

    @classmethod
    def ending_at(cls, last: Tensor, length: int) -> RaggedRows:
        """Return rows padded on the right to `length`; `last` [B] is the position of each row's last token."""
        filled = (torch.arange(length, device=last.device) <= last[:, None]).flatten()
        # A place of padding gets the index of the token before it: a valid index, so padding holds finite numbers.
        return cls(filled.nonzero()[:, 0], filled.cumsum(0) - 1, (len(last), length))

    def spread(self, x: Tensor) -> Tensor:
        """Return `x` [1, H, N, C] as padded rows [H · B, T, C]; padding holds finite numbers."""
        spread: Tensor = _Spread.apply(x[0], self.places, self.tokens)  # type: ignore[no-untyped-call]
        # Heads come first in memory, so a view makes every row of every head one item of a batched product.
        return spread.view(-1, self.shape[1], x.shape[-1])

    def collect(self, x: Tensor) -> Tensor:
        """Return `x` [H · B, T, C] without padding: [1, N, H, C]."""
        flat = x.reshape(-1, len(self.tokens), x.shape[-1])
        collected: Tensor = _Collect.apply(flat, self.places)  # type: ignore[no-untyped-call]
        # The layout that transformers' attention functions return: heads after tokens, contiguous.
        return collected.transpose(0, 1).contiguous()[None]


class _Spread(torch.autograd.Function):
    """[H, N, C] -> [H, B · T, C]. Padding must stay hidden: its gradient is dropped.

    The backward pass is therefore a plain selection; that of `index_select` would also sum over the padding.
    """

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
        # Places are distinct, so gradients are copied, not added; padding was left out, so its gradient is 0.
        return d_out.new_zeros(ctx.size).index_copy_(1, places, d_out), None
