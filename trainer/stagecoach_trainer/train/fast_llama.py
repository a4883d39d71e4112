"""Two parts of transformers' LLaMA made cheaper on a CPU, for as long as a training stage runs.

- The rotary embedding in place: three passes over queries and keys instead of five forward and ten backward.
- The last layer's feed-forward part, and the final norm, only where there is loss: nothing behind the last attention
  mixes positions, so what happens elsewhere reaches neither the loss nor any gradient.

B rows, H heads, T tokens, C width of a head, D width of the model, M positions with loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stagecoach_trainer.train.causal import CausalLoss

LOSS_AT = "stagecoach_loss_at"
"""Keyword under which the positions with loss reach the last layer (a keyword, so that a recomputed layer gets the same
ones)."""

PLAIN_ATTENTION = frozenset({"eager", "sdpa", "stagecoach_short"})
"""Attention functions known to ignore keywords they do not know."""


@contextmanager
def fast_llama(loss: CausalLoss, device: torch.device) -> Iterator[None]:
    """Speed up a LLaMA on a CPU; other models and devices are left as they are."""
    from transformers.models.llama import modeling_llama

    decoder: Any = loss.decoder
    if device.type != "cpu" or type(decoder) is not modeling_llama.LlamaModel:
        yield
        return
    last = decoder.layers[-1]
    original = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = rotate_queries_and_keys
    trims = type(last) is modeling_llama.LlamaDecoderLayer and decoder.config._attn_implementation in PLAIN_ATTENTION
    if trims:
        last.forward = _TrimmedLayer(last)
        loss.loss_at_keyword = LOSS_AT
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = original
        if trims:
            del last.forward
            loss.loss_at_keyword = None


class _TrimmedLayer:
    """The forward pass of a decoder layer that goes on behind its attention only where there is loss."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer

    def __call__(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """hidden_states [B, T, D] -> [B, T, D], or [1, M, D] where positions are given."""
        loss_at = keywords.pop(LOSS_AT, None)
        layer = self._layer
        attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), *arguments, **keywords)
        states: Tensor = hidden_states + attended
        if loss_at is not None:
            states = states.flatten(0, 1).index_select(0, loss_at).unsqueeze(0)
        result: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
        return result


def rotate_queries_and_keys(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Return queries and keys [B, H, T, C], rotated by their positions; `cos`, `sin` [B or 1, T, C].

    In the place of transformers' `apply_rotary_pos_emb`; results lie in memory as attention reads them.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    """(x1, x2) -> (x1·c1 - x2·s1, x2·c2 + x1·s2), the halves of the last dimension (RoPE, arXiv 2104.09864)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(x, cos, out=out)
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1.0)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        rows, heads, length, width = d_out.shape
        half = width // 2
        d_x = d_out.new_empty((rows, length, heads, width)).transpose(1, 2)  # as the projections lay it out
        torch.mul(d_out, cos, out=d_x)
        d_x[..., :half].addcmul_(d_out[..., half:], sin[..., half:])
        d_x[..., half:].addcmul_(d_out[..., :half], sin[..., :half], value=-1.0)
        return d_x, None, None
