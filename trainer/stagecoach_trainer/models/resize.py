"""Rows of the embedding and the head: which ids have one, and how they grow with a vocabulary.

A model may have more rows than its vocabulary has tokens; published models are padded by any number (phi-2 by 905).
Such surplus rows are kept, a growing vocabulary takes them first, and they are never sampled.

V rows before, N new rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from stagecoach_api.training import NewRows
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.vocabulary import META_SPACE


def num_rows(model: Any) -> int:
    """Return the number of rows of the model's input embedding, also if ZeRO-3 has sharded it."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def is_tied(model: Any) -> bool:
    """Return whether embedding and head are the same matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def row_modules(model: Any) -> list[Any]:
    """Return the embedding and, unless it is tied to it, the head."""
    modules: list[Any] = [model.get_input_embeddings()]
    if model.get_output_embeddings() is not None and not is_tied(model):
        modules.append(model.get_output_embeddings())
    return modules


def require_new_rows(new_rows: range, where: str, instead: str) -> None:
    """Raise UserError if a stage trains new rows and the model has none. `instead`: what else could be trained."""
    if not new_rows:
        raise UserError(
            f"{where}: the model has no new rows, neither from this stage nor from an earlier one; give a larger "
            f"`tokenizer`, or train {instead}"
        )


def num_ids(tokenizer: Any) -> int:
    """Return how many rows a vocabulary needs: one more than its highest id, which may leave gaps below it."""
    return int(max(tokenizer.get_vocab().values())) + 1


def ids_without_token(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids for which the model has a row and the vocabulary no token: surplus rows, and gaps."""
    return sorted(set(range(num_rows(model))).difference(tokenizer.get_vocab().values()))


def check_sizes(model: Any, tokenizer: Any, where: str) -> None:
    """Raise UserError unless the model has a row for each token of the vocabulary; it may have any number more."""
    rows, ids = num_rows(model), num_ids(tokenizer)
    if ids <= rows:
        return
    without = [token for token, index in tokenizer.get_vocab().items() if index >= rows]
    raise UserError(
        f"{where}: the vocabulary has {ids} ids and the model {rows} rows, so {len(without)} tokens have none, such as "
        f"{min(without)!r}; train the model in a `pretrain` or `sft` stage first, which adds rows as `resize` sets, or "
        "remove these tokens from the vocabulary"
    )


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


def first_new_id(model: Any, old_tokenizer: Any | None) -> int:
    """Return the first id that is new in a larger vocabulary; without the old vocabulary, that of the first new row."""
    return num_rows(model) if old_tokenizer is None else min(num_rows(model), num_ids(old_tokenizer))


def grow(
    model: Any,
    old_tokenizer: Any | None,
    new_tokenizer: Any,
    how: NewRows,
    seed: int | None = None,
    first: int | None = None,
) -> range:
    """Initialise the rows of new tokens in the embedding and the head; return their ids.

    New tokens take surplus rows first, whose content is replaced, and then appended ones. `first`: the first new id, by
    default as `first_new_id`. `mean` needs the vocabulary the model was trained with; `random` needs the seed. Tied
    matrices stay tied.
    Raises UserError if no id is new, or `mean` has no old vocabulary.
    """
    rows, new = num_rows(model), num_ids(new_tokenizer)
    old = first_new_id(model, old_tokenizer) if first is None else first
    if new <= old:
        raise UserError(f"the vocabulary has {new} tokens and the model's own {old}; give a larger vocabulary")
    if how is NewRows.MEAN and old_tokenizer is None:
        raise UserError(
            "resize.newRows: `mean` splits each new token by the model's own vocabulary, but the model's folder has "
            "none; add it there, or choose `random` or `zero`"
        )
    sub_tokens = _sub_tokens(old_tokenizer, new_tokenizer, old, new) if how is NewRows.MEAN else []
    # One generator for both matrices, so that the head's random rows differ from the embedding's.
    generator = torch.Generator().manual_seed(seed or 0)
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    # Rows are computed from the old matrices before resizing, which replaces them. `mean_resizing` would draw new rows
    # from a normal distribution fitted to the old ones; they are overwritten here, so the fit is skipped.
    added = [_new_rows(matrix[:old], new - old, how, sub_tokens, deviation, generator) for matrix in _matrices(model)]
    if new > rows:
        model.resize_token_embeddings(new, mean_resizing=False)
    with torch.no_grad():
        for matrix, its_rows in zip(_matrices(model), added, strict=True):
            matrix[old:new] = its_rows
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias[old:new] = 0.0
    return range(old, new)


def _matrices(model: Any) -> list[torch.Tensor]:
    """Return the embedding [V, D] and, unless it is the same matrix, the head [V, D]."""
    return [module.weight for module in row_modules(model)]


def _new_rows(
    matrix: torch.Tensor,
    count: int,
    how: NewRows,
    sub_tokens: list[list[int]],
    deviation: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the rows [N, D] for N new tokens, from the rows `matrix` [V, D] of the old ones."""
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
    # The old vocabulary may know the new tokens, if it was larger than the model: they have no row to average.
    return [[int(token) for token in ids if token != unknown and token < old] for ids in encoded]


def _text_of(tokenizer: Any, index: int, piece: str) -> str:
    """Return the text of a token; a SentencePiece piece keeps its leading space."""
    if META_SPACE in piece or index in tokenizer.added_tokens_decoder:
        return piece.replace(META_SPACE, " ")
    text: str = tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
