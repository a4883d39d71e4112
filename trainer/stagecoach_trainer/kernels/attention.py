"""Attention over short rows on a CPU, as plain batched matrix products.

For a few hundred tokens, PyTorch's flash kernel for CPUs takes twice as long, most of it in the backward pass. Where
there are too many probabilities to keep, PyTorch's kernel is used as before. Position by position, both agree to
rounding.

B rows, H heads, T tokens, C width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_trainer.kernels.causal import DecoderLoss, causal_model
from stagecoach_trainer.kernels.ragged_rows import RaggedRows

NAME = "stagecoach_short"
REPLACED = "sdpa"
ROWS_KEYWORD = "stagecoach_rows"
"""Keyword that passes the layout of rows without padding to attention."""
LARGEST_PROBABILITIES = 1 << 22
"""Upper limit of B · H · T · T for keeping the probabilities for the backward pass: 8 MiB a layer in bf16."""


def uses_replaced_attention(loss: DecoderLoss) -> bool:
    """Return whether a model computes attention by PyTorch's kernel, which `short_attention` replaces."""
    return bool(causal_model(loss.model).config._attn_implementation == REPLACED)


@contextmanager
def short_attention(model: nn.Module) -> Iterator[None]:
    """Let a model use `attend` instead of PyTorch's kernel for as long as the block lasts."""
    config = causal_model(model).config
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
    stagecoach_rows: RaggedRows | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output [B, T, H, C]. The signature is that of transformers' attention functions.

    `query` [B, H, T, C]; `key`, `value` [B, a divisor of H, S, C], values of any width; `attention_mask` [B, 1, T, S],
    true where a position is visible, or None for plain causal attention. S equals T, or exceeds it if one new token
    follows a cache.
    `stagecoach_rows`: the single row consists of these rows, each with its own causal attention; the mask is ignored.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if stagecoach_rows is not None:
        return _attend_rows(module, query, key, value, stagecoach_rows, scale, dropout), None
    rows, heads, length, width = query.shape
    seen = key.shape[2]
    # A float mask holds biases, and several new tokens after a cache need a mask of another shape: neither is handled.
    plain = attention_mask is None or attention_mask.dtype is torch.bool
    if not plain or length not in (1, seen) or rows * heads * length * seen > LARGEST_PROBABILITIES:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output
    groups = heads // key.shape[1]  # grouped-query attention (arXiv 2305.13245): several heads share keys and values
    q = query.reshape(rows * heads, length, width)
    # Values may be narrower than keys (multi-head latent attention, arXiv 2405.04434).
    k, v = (repeat_kv(item, groups).reshape(rows * heads, seen, item.shape[-1]) for item in (key, value))
    result = _weighted_values(q, k, v, hidden_positions(attention_mask, q, seen), scale, dropout, module.training)
    return result.view(rows, heads, length, v.shape[-1]).transpose(1, 2).contiguous(), None


def _attend_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rows: RaggedRows, scale: float, dropout: float
) -> Tensor:
    """Return the output [1, N, H, C] of the tokens [1, H, N, C] of concatenated rows."""
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = query.shape[1] // key.shape[1]
    q, k, v = (rows.spread(item) for item in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    # Padded places come after a row's end, so the causal mask hides them from its tokens; no other mask is needed.
    if q.shape[0] * q.shape[1] ** 2 > LARGEST_PROBABILITIES:
        drop = dropout if module.training else 0.0
        found = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True, scale=scale)
        return rows.collect(found)
    bias = hidden_positions(None, q, q.shape[1])
    return rows.collect(_weighted_values(q, k, v, bias, scale, dropout, module.training))


def _weighted_values(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, dropout: float, training: bool
) -> Tensor:
    """Return the attention-weighted mean of the values [B · H, T, C]; `bias` is added to the scores."""
    # One product adds the mask as it computes the scores, so no [T, S] tensor is masked in a pass of its own.
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    p = torch.softmax(scores, dim=-1)
    if dropout:
        p = torch.dropout(p, dropout, training)
    return torch.bmm(p, v)


def hidden_positions(attention_mask: Tensor | None, q: Tensor, seen: int) -> Tensor:
    """Return the bias [1 or B · H, T, S] that hides positions from `q` [B · H, T, C]; S is `seen`.

    Plain causal attention uses -inf. With a mask, the bias is half the lowest finite number: left padding sees no
    position at all, so with -inf its states would be NaN, and 0 * NaN is NaN.
    """
    length = q.shape[1]
    if attention_mask is None:
        return q.new_full((1, length, seen), float("-inf")).triu_(1 + seen - length)
    unseen = torch.finfo(q.dtype).min / 2
    bias = torch.zeros_like(attention_mask, dtype=q.dtype).masked_fill_(~attention_mask, unseen)
    rows = attention_mask.shape[0]
    return bias.expand(rows, len(q) // rows, length, seen).reshape(-1, length, seen)
