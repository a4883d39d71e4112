"""Hidden states of rows of different lengths without computing their padding, a quarter of a batch of answers.

Attention alone mixes positions. So the tokens of all rows are concatenated to one row, and are laid out as padded rows
only inside attention (`attention.attend`).

B rows, T tokens of the longest, N tokens in all, M requested places, H heads, C width of a head, D width of the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stagecoach_trainer.kernels.attention import NAME, ROWS_KEYWORD
from stagecoach_trainer.kernels.ragged_rows import RaggedRows

WORTH_UNPADDING = 0.95
"""Share of places holding a token above which removing the padding costs more than computing it."""


def states_at(decoder: nn.Module, tokens: Tensor, at: Tensor, last: Tensor, keyword: str | None = None) -> Tensor:
    """Return a decoder's last hidden states [M, D] at the places `at` [M] of the flattened [B · T].

    `tokens` [B, T], padded on the right after position `last` [B] of each row. No mask is needed: attention is causal,
    and padding follows every requested place. `keyword`: the decoder returns the states at given places only when these
    are passed by this keyword (`DecoderLoss.positions_keyword`).
    """
    if keyword is None or not len(at):
        hidden = _hidden(decoder, tokens)
        return hidden.flatten(0, 1).index_select(0, at)
    rows = RaggedRows.ending_at(last, tokens.shape[1])
    config: Any = decoder.config
    # Only our own attention understands ROWS_KEYWORD.
    if config._attn_implementation != NAME or len(rows.places) > WORTH_UNPADDING * tokens.numel():
        return _hidden(decoder, tokens, **{keyword: at})[0]
    keywords = {
        keyword: rows.tokens[at],
        ROWS_KEYWORD: rows,
        "position_ids": (rows.places % tokens.shape[1])[None],
        "attention_mask": tokens.new_ones((1, 1, 1, 1)),  # a 4-D mask is passed on; else transformers makes its own
    }
    return _hidden(decoder, tokens.flatten()[rows.places][None], **keywords)[0]


def _hidden(decoder: nn.Module, tokens: Tensor, **keywords: Any) -> Tensor:
    hidden: Tensor = decoder(input_ids=tokens, use_cache=False, **{"attention_mask": None} | keywords).last_hidden_state
    return hidden
