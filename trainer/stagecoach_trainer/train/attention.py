"""Attention over short rows on a CPU, as plain batched matrix products.

PyTorch's flash kernel for CPUs takes twice as long for a few hundred tokens, most of it in the backward pass. Where the
probabilities are too many to keep, or on a GPU, its kernel is used as before. Position by position the two agree to
rounding.

B rows, H heads, T tokens, C width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_trainer.train.causal import causal_model

NAME = "stagecoach_short"
REPLACED = "sdpa"
LARGEST_PROBABILITIES = 1 << 22
"""B · H · T · T up to which the probabilities are kept for the backward pass: 8 MiB a layer in bf16."""


@contextmanager
def short_attention(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a model on a CPU use `attend` where it would use PyTorch's kernel, for as long as the block lasts."""
    config = causal_model(model).config
    if device.type != "cpu" or config._attn_implementation != REPLACED:
        yield
        return
    _register()
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = REPLACED


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output [B, T, H, C]; in the form transformers calls its attention functions.

    `query` [B, H, T, C]; `key`, `value` with a divisor of H heads; `attention_mask` [B, 1, T, T], true where a position
    is seen, or None for plain causal attention.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    rows, heads, length, width = query.shape
    plain = attention_mask is None or attention_mask.dtype is torch.bool
    if not plain or key.shape[2] != length or rows * heads * length * length > LARGEST_PROBABILITIES:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output
    groups = heads // key.shape[1]
    flat = (rows * heads, length, width)
    q = query.reshape(flat)
    k, v = repeat_kv(key, groups).reshape(flat), repeat_kv(value, groups).reshape(flat)
    bias = hidden_positions(attention_mask, q)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5 if scaling is None else scaling)
    p = torch.softmax(scores, dim=-1)
    if dropout:
        p = torch.dropout(p, dropout, module.training)
    result = torch.bmm(p, v).view(rows, heads, length, width)
    return result.transpose(1, 2).contiguous(), None


def hidden_positions(attention_mask: Tensor | None, q: Tensor) -> Tensor:
    """Return what is added to the scores: −∞, or as good as it, where a position is not seen [1 or B · H, T, T].

    A position of padding in front sees none at all; with −∞ its states would be no numbers, and 0 times those is none
    either.
    """
    length = q.shape[1]
    if attention_mask is None:
        return q.new_full((1, length, length), float("-inf")).triu_(1)
    unseen = torch.finfo(q.dtype).min / 2
    bias = torch.zeros_like(attention_mask, dtype=q.dtype).masked_fill_(~attention_mask, unseen)
    rows = attention_mask.shape[0]
    return bias.expand(rows, len(q) // rows, length, length).reshape(-1, length, length)
