"""Grow the embedding and the head to a larger vocabulary: old rows keep their bits, new rows are appended.

V rows before, N new rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from stagecoach_api.training import NewRows
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.vocabulary import META_SPACE

MAX_PADDING_SHARE = 0.01
PADDING_MULTIPLE = 64


def num_rows(model: Any) -> int:
    """Return the number of rows of the model's input embedding, also if ZeRO-3 has sharded it."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def check_sizes(model: Any, tokenizer: Any, where: str) -> None:
    """Raise UserError unless the model has one row for each token of the vocabulary.

    More rows are accepted if the matrix was evidently padded: the excess is at most 1 % of the rows, and the number of
    rows is a multiple of 64.
    """
    rows, tokens = num_rows(model), len(tokenizer)
    if rows == tokens:
        return
    padding = rows - tokens
    if 0 < padding <= MAX_PADDING_SHARE * rows and rows % PADDING_MULTIPLE == 0:
        return
    advice = (
        "set the larger vocabulary as the stage's `tokenizer`, and the model is grown as `resize` sets"
        if tokens > rows
        else "models are never shrunk: give the vocabulary it was trained with"
    )
    raise UserError(f"{where}: the vocabulary has {tokens} tokens and the model {rows} rows; {advice}")


def check_old_ids(old_tokenizer: Any, new_tokenizer: Any, where: str) -> None:
    """Raise UserError if a token of the old vocabulary is missing or has another id in the new one."""
    new = new_tokenizer.get_vocab()
    moved = sorted(
        (index, token) for token, index in old_tokenizer.get_vocab().items() if new.get(token, index) != index
    )
    lost = sorted((index, token) for token, index in old_tokenizer.get_vocab().items() if token not in new)
    if moved or lost:
        index, token = (moved or lost)[0]
        raise UserError(
            f"{where}: token {token!r} has id {index} in the model's vocabulary and {new.get(token)} in the new one "
            f"({len(moved)} moved, {len(lost)} missing); a larger vocabulary must keep the old ids"
        )


def grow(model: Any, old_tokenizer: Any | None, new_tokenizer: Any, how: NewRows, seed: int | None = None) -> range:
    """Append rows for new tokens to the embedding and the head; return the new rows' ids.

    `mean` needs the vocabulary the model was trained with; `random` needs the seed. Tied matrices stay tied.
    Raises UserError if the vocabulary is not larger than the model, or `mean` has no old vocabulary.
    """
    old, new = num_rows(model), len(new_tokenizer)
    if new <= old:
        raise UserError(f"the vocabulary has {new} tokens and the model {old} rows; give a larger vocabulary")
    if how is NewRows.MEAN and old_tokenizer is None:
        raise UserError(
            "resize.newRows: `mean` splits each new token by the model's own vocabulary, but the model's folder has "
            "none; add it there, or choose `random` or `zero`"
        )
    embedding, head = _matrices(model)
    tied = head is None
    sub_tokens = _sub_tokens(old_tokenizer, new_tokenizer, old, new) if how is NewRows.MEAN else []
    # One generator for both matrices, so that the head's random rows differ from the embedding's.
    generator = torch.Generator().manual_seed(seed or 0)
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    added = [
        _new_rows(matrix, new - old, how, sub_tokens, deviation, generator)
        for matrix in ([embedding] if tied or head is None else [embedding, head])
    ]
    # Rows are computed from the old matrices before resizing, which replaces them. `mean_resizing` would draw new rows
    # from a normal distribution fitted to the old ones; they are overwritten here, so the fit is skipped.
    model.resize_token_embeddings(new, mean_resizing=False)
    grown_embedding, grown_head = _matrices(model)
    with torch.no_grad():
        grown_embedding[old:] = added[0]
        if grown_head is not None:
            grown_head[old:] = added[1]
    return range(old, new)


def _matrices(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the embedding [V, D] and the head [V, D], or None for the head if it is the same matrix."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is embedding or model.config.tie_word_embeddings:
        return embedding, None
    return embedding, head.weight


def _new_rows(
    matrix: torch.Tensor,
    count: int,
    how: NewRows,
    sub_tokens: list[list[int]],
    deviation: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the rows [N, D] to append to `matrix` [V, D]."""
    width = matrix.shape[1]
    if how is NewRows.ZERO:
        return torch.zeros(count, width, dtype=matrix.dtype)
    if how is NewRows.RANDOM:
        # Drawn in the default dtype and then cast, so that a seed gives the same numbers whatever the model's dtype.
        return (torch.randn(count, width, generator=generator) * deviation).to(matrix.dtype)
    old = matrix.detach()
    # In fp32, because a mean of many bf16 rows loses digits; `overall` is for tokens without known sub-tokens.
    overall = old.float().mean(dim=0)
    rows = [old[tokens].float().mean(dim=0) if tokens else overall for tokens in sub_tokens]
    return torch.stack(rows).to(matrix.dtype)


def _sub_tokens(old_tokenizer: Any, new_tokenizer: Any, old: int, new: int) -> list[list[int]]:
    """Return the ids of each new token's text in the old vocabulary; empty if it has none."""
    from stagecoach_trainer.text.encoding import Encoder

    pieces = new_tokenizer.convert_ids_to_tokens(list(range(old, new)))
    texts = [_text_of(new_tokenizer, index, piece) for index, piece in zip(range(old, new), pieces, strict=True)]
    unknown = old_tokenizer.unk_token_id
    encoded = Encoder(old_tokenizer).continuations(texts, parse_special=False)
    # The old vocabulary may be larger than the model: ids from `old` on have no row to average.
    return [[int(token) for token in ids if token != unknown and token < old] for ids in encoded]


def _text_of(tokenizer: Any, index: int, piece: str) -> str:
    """Return the text of a token; a SentencePiece piece keeps its leading space."""
    if META_SPACE in piece or index in tokenizer.added_tokens_decoder:
        return piece.replace(META_SPACE, " ")
    text: str = tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
