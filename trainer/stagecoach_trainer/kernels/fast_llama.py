"""Three parts of transformers' LLaMA made cheaper on a CPU, for as long as a training stage runs.

- The norms with a backward pass of their own, and the cast behind them included: a quarter of the time.
- The rotary embedding in place: three passes over queries and keys instead of five forward and ten backward.
- The last layer's feed-forward part, and the final norm, only where there is loss: nothing behind the last attention
  mixes positions, so what happens elsewhere reaches neither the loss nor any gradient.

B rows, H heads, T tokens, C width of a head, D width of the model, M positions with loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stagecoach_trainer.kernels.causal import DecoderLoss

LOSS_AT = "stagecoach_loss_at"
"""Keyword under which the positions with loss reach the last layer (a keyword, so that a recomputed layer gets the same
ones)."""

PLAIN_ATTENTION = frozenset({"eager", "sdpa", "stagecoach_short"})
"""Attention functions known to ignore keywords they do not know."""


def is_llama(loss: DecoderLoss) -> bool:
    """Return whether a loss module's decoder is transformers' LLaMA itself, not a subclass that may differ."""
    from transformers.models.llama import modeling_llama

    return type(loss.decoder) is modeling_llama.LlamaModel


def last_layer_can_be_trimmed(loss: DecoderLoss) -> bool:
    """Return whether the last layer is a plain LLaMA layer whose attention ignores the keyword `LOSS_AT`."""
    from transformers.models.llama import modeling_llama

    decoder: Any = loss.decoder
    return (
        is_llama(loss)
        and type(decoder.layers[-1]) is modeling_llama.LlamaDecoderLayer
        and decoder.config._attn_implementation in PLAIN_ATTENTION
    )


@contextmanager
def in_place_rotation() -> Iterator[None]:
    """Replace the rotary embedding of every LLaMA of this process for as long as the block lasts."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = rotate_queries_and_keys
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = original


@contextmanager
def fused_norms(loss: DecoderLoss, dtype: torch.dtype) -> Iterator[None]:
    """Replace a LLaMA's norms with fp32 weights; `dtype`: that of the computation, which they return."""
    from transformers.models.llama import modeling_llama

    with ExitStack() as undo:
        for module in loss.decoder.modules():
            if type(module) is modeling_llama.LlamaRMSNorm and module.weight.dtype is torch.float32:
                # An instance attribute hides the class's method; deleting it brings the method back.
                undo.callback(delattr, module, "forward")
                module.forward = _FusedNorm(module, dtype)  # type: ignore[method-assign]
        yield


@contextmanager
def trimmed_last_layer(loss: DecoderLoss) -> Iterator[None]:
    """Let a LLaMA's last layer compute only the positions asked for by `loss.positions_keyword`."""
    decoder: Any = loss.decoder
    last = decoder.layers[-1]
    last.forward = _TrimmedLayer(last)
    loss.positions_keyword = LOSS_AT
    try:
        yield
    finally:
        loss.positions_keyword = None
        del last.forward


class _FusedNorm:
    """The forward pass of an RMS norm (arXiv 1910.07467) that returns the dtype the next layer computes in."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        self._norm: Any = norm
        self._dtype = dtype

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] of any dtype -> [..., D]."""
        norm = self._norm
        flat = hidden_states.float().flatten(0, -2)
        result: Tensor = _RmsNorm.apply(flat, norm.weight, norm.variance_epsilon, self._dtype)  # type: ignore[no-untyped-call]
        return result.view(hidden_states.shape)


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) · weight, for rows x [N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, weight, scale)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        return torch.mul(normal, weight, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        normal, weight, scale = ctx.saved_tensors
        d = d_out.to(torch.float32, copy=True)
        d_weight = (d * normal).sum(0) if ctx.needs_input_grad[1] else None
        d.mul_(weight)
        along = torch.linalg.vecdot(d, normal).div_(normal.shape[-1]).unsqueeze(1)
        return d.addcmul_(normal, along, value=-1.0).mul_(scale), d_weight, None, None


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
