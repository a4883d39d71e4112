"""Rows of unlike lengths without their padding: a quarter of what a batch of answers is computed for.

Nothing but attention mixes positions. So tokens lie one behind the other, as one row, and stand in padded rows for as
long as attention looks at them (`attention.attend`).

B rows, T tokens of the longest, N tokens in all, M places asked for, H heads, C width of a head, D width of the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stagecoach_trainer.kernels.attention import NAME, ROWS_KEYWORD
from stagecoach_trainer.kernels.ragged_rows import RaggedRows

WORTH_UNPADDING = 0.95
"""Share of places that hold a token above which taking the others out costs more than computing them."""


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
