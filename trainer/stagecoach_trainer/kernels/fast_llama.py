"""Three parts of transformers' LLaMA, made cheaper on a CPU while a training stage runs.

- The norms, with their own backward pass and the following cast included: a quarter of the time.
- The rotary embedding, in place: three passes over queries and keys instead of five forward and ten backward.
- The last layer's feed-forward part and the final norm, only at positions with loss: after the last attention, no
  operation mixes positions, so the other positions reach neither the loss nor any gradient.

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
"""Keyword that passes the positions with loss to the last layer. A keyword argument, so that a layer recomputed by
gradient checkpointing receives the same positions."""

PLAIN_ATTENTION = frozenset({"eager", "sdpa", "stagecoach_short"})
"""Attention functions known to ignore unknown keywords."""


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
    """The forward pass of an RMS norm (arXiv 1910.07467); returns the dtype in which the next layer computes."""

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
        # rsqrt(mean(x²) + ε), computed from the L2 norm: one pass over x, then in place over [N, 1] values.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, weight, scale)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        return torch.mul(normal, weight, out=out)  # `out` casts the product in the same pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        normal, weight, scale = ctx.saved_tensors
        # With y = x · scale · weight and n = x · scale, d = d_y · weight: d_x = scale · (d − n · mean(d · n)).
        d = d_out.to(torch.float32, copy=True)
        d_weight = (d * normal).sum(0) if ctx.needs_input_grad[1] else None
        d.mul_(weight)
        along = torch.linalg.vecdot(d, normal).div_(normal.shape[-1]).unsqueeze(1)
        return d.addcmul_(normal, along, value=-1.0).mul_(scale), d_weight, None, None


class _TrimmedLayer:
    """The forward pass of a decoder layer that continues after its attention only at positions with loss."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer

    def __call__(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """hidden_states [B, T, D] -> [B, T, D], or [1, M, D] if positions are given."""
        loss_at = keywords.pop(LOSS_AT, None)
        layer = self._layer
        # The rest is transformers' `LlamaDecoderLayer.forward`, except for the selection of positions.
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

    Replaces transformers' `apply_rotary_pos_emb`; the results are contiguous, as attention reads them.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    """(x1, x2) -> (x1·c1 - x2·s1, x2·c2 + x1·s2), the halves of the last dimension (RoPE, arXiv 2104.09864)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2  # transformers pairs component i with i + half, not with its neighbour
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
        # A rotation's transpose is the rotation by the negative angle: the signs of the sines change.
        d_x = d_out.new_empty((rows, length, heads, width)).transpose(1, 2)  # the memory layout of the projections
        torch.mul(d_out, cos, out=d_x)
        d_x[..., :half].addcmul_(d_out[..., half:], sin[..., half:])
        d_x[..., half:].addcmul_(d_out[..., :half], sin[..., :half], value=-1.0)
        return d_x, None, None
