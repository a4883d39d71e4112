"""Rows of unlike lengths without their padding: a quarter of what a batch of answers is computed for.

Nothing but attention mixes positions. So tokens lie one behind the other, as one row, and stand in padded rows for as
long as attention looks at them (`attention.attend`).

B rows, T tokens of the longest, N tokens in all, M places asked for, H heads, C width of a head, D width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stagecoach_trainer.train.attention import NAME, ROWS_KEYWORD

WORTH_UNPADDING = 0.95
"""Share of places that hold a token above which taking the others out costs more than computing them."""


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


def states_at(decoder: nn.Module, tokens: Tensor, at: Tensor, last: Tensor, keyword: str | None = None) -> Tensor:
    """Return a decoder's last hidden states [M, D] at places `at` [M] of the flattened [B · T].

    `tokens` [B, T], padded on the right behind position `last` [B] of each row. No mask is needed: attention is causal,
    and padding comes behind what is looked at. `keyword`: by it the decoder can be asked for the states at given places
    only (`fast_llama`).
    """
    if keyword is None or not len(at):
        hidden = _hidden(decoder, tokens)
        return hidden.flatten(0, 1).index_select(0, at)
    rows = RaggedRows.ending_at(last, tokens.shape[1])
    config: Any = decoder.config
    if config._attn_implementation != NAME or len(rows.places) > WORTH_UNPADDING * tokens.numel():
        return _hidden(decoder, tokens, **{keyword: at})[0]
    keywords = {
        keyword: rows.tokens[at],
        ROWS_KEYWORD: rows,
        "position_ids": (rows.places % tokens.shape[1])[None],
        "attention_mask": tokens.new_ones((1, 1, 1, 1)),  # of four dimensions: transformers makes none of its own
    }
    return _hidden(decoder, tokens.flatten()[rows.places][None], **keywords)[0]


def _hidden(decoder: nn.Module, tokens: Tensor, **keywords: Any) -> Tensor:
    hidden: Tensor = decoder(input_ids=tokens, use_cache=False, **{"attention_mask": None} | keywords).last_hidden_state
    return hidden
