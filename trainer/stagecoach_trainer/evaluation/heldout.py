"""Loss on text the model has not seen: nats per token, bits per character, and the perplexities of both.

Text is read from its first record on until `maxTokens` are measured. Each document begins with the begin token (or the
end token, where the vocabulary has no begin token) and is scored token by token; a document longer than a row goes on
in the next, whose first token is the last one of the row before. Conversations are scored as they would be served: what
the assistant says, end token included, given everything before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagecoach_api.references import NamedSource
from stagecoach_api.stages.evaluate import EvaluateStage
from stagecoach_api.stages.sft import Loss
from stagecoach_trainer.data.records import Fetches, Record, read_records
from stagecoach_trainer.errors import UserError
from stagecoach_trainer.samples.encoding import Encoder, Ids
from stagecoach_trainer.text.templates import Renderer, message_of, parse_tools
from stagecoach_trainer.train.measure import Measured, measure
from stagecoach_trainer.train.rows import IGNORE, Row

SLICE_BATCHES = 8
"""Micro-batches measured between two reports of progress."""


@dataclass(frozen=True)
class Piece:
    """At most a row of tokens, measured on its own."""

    tokens: Ids
    """[T]."""

    scored_from: int
    """The tokens from here on are scored, each at the position before it; ≥ 1."""

    characters: int
    """Characters the scored tokens stand for."""


@dataclass(frozen=True)
class HeldOutFigures:
    """What a set came to."""

    metrics: dict[str, float]
    """`heldOut.<name>.<metric>`."""

    counts: dict[str, int]
    """Tokens, characters and records behind them."""


def measure_held_out(
    source: NamedSource,
    config: EvaluateStage,
    model: Any,
    tokenizer: Any,
    context: Fetches,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutFigures:
    """Measure one set. Raises UserError where nothing of it can be measured."""
    taken = take(pieces_of(read_records(context, source), tokenizer, config.sequence_length), config.max_tokens)
    rows = pack(taken.pieces, config.sequence_length)
    characters = sum(piece.characters for piece in taken.pieces)
    if not rows or not characters:
        raise UserError(
            f"heldOut {source.name}: nothing could be measured; it has {taken.num_records} records, "
            f"{taken.num_too_long} of them longer than `sequenceLength` {config.sequence_length}"
        )
    found = _measure_in_slices(model, rows, config.batch_rows, report)
    counts = {
        "records": taken.num_records,
        "tooLong": taken.num_too_long,
        "tokens": found.tokens,
        "characters": characters,
    }
    return HeldOutFigures(figures(source.name, found, characters), counts)


def figures(name: str, found: Measured, characters: int) -> dict[str, float]:
    """Return the metrics of a set under the names gates use."""
    per_character = Measured(found.nll, characters)
    return {
        f"heldOut.{name}.loss": found.loss,
        f"heldOut.{name}.perplexity": found.perplexity,
        f"heldOut.{name}.bitsPerCharacter": found.bits_per_character(characters),
        f"heldOut.{name}.perplexityPerCharacter": per_character.perplexity,
        f"heldOut.{name}.tokensPerCharacter": found.tokens / characters,
    }


def _measure_in_slices(
    model: Any, rows: Sequence[Row], batch_rows: int, report: Callable[[int, int], None]
) -> Measured:
    nll, tokens = 0.0, 0
    step = SLICE_BATCHES * batch_rows
    for start in range(0, len(rows), step):
        found = measure(model, rows[start : start + step], batch_rows)
        nll, tokens = nll + found.nll, tokens + found.tokens
        report(min(start + step, len(rows)), len(rows))
    if not math.isfinite(nll):
        raise UserError("heldOut: the loss is no number; try `precision: fp32`, else the model is broken")
    return Measured(nll, tokens)


# -- records to pieces -------------------------------------------------------------------------------------------------


def pieces_of(records: Iterable[Record], tokenizer: Any, sequence_length: int) -> Iterator[list[Piece] | None]:
    """Yield the pieces of each record; None for one that does not fit into a row and cannot be cut."""
    encoder, renderer = Encoder(tokenizer), Renderer(tokenizer)
    for record in records:
        if record.text is not None:
            yield document_pieces(record.text, encoder, sequence_length)
            continue
        if tokenizer.chat_template is None:
            raise UserError(f"{record.where}: a conversation needs a chat template; name the stage's `template`")
        pieces = turn_pieces(record, encoder, renderer)
        yield pieces if all(len(piece.tokens) <= sequence_length for piece in pieces) else None


def document_pieces(text: str, encoder: Encoder, sequence_length: int) -> list[Piece]:
    """Cut a document into pieces of at most `sequence_length` tokens, so that each of its tokens is scored once."""
    start = encoder.bos if encoder.bos is not None else encoder.eos
    ids = encoder.documents([text])[0]
    tokens = ids if start is None else np.concatenate([np.asarray([start], dtype=np.int32), ids])
    step = sequence_length - 1
    pieces = [tokens[begin : begin + sequence_length] for begin in range(0, max(1, len(tokens) - 1), step)]
    scored = [len(piece) - 1 for piece in pieces]
    shares = _shares(len(text), scored)
    return [Piece(piece, 1, share) for piece, share in zip(pieces, shares, strict=True) if len(piece) > 1]


def _shares(characters: int, scored: Sequence[int]) -> list[int]:
    """Share out a document's characters over its pieces by their tokens; together they are all of them."""
    total, done, given = max(1, sum(scored)), 0, 0
    shares = []
    for count in scored:
        done += count
        shares.append(characters * done // total - given)
        given += shares[-1]
    return shares


def turn_pieces(record: Record, encoder: Encoder, renderer: Renderer) -> list[Piece]:
    """Return one piece per turn the model must say: the prompt as it is served, then the answer, which is scored."""
    messages = [message_of(turn.role, turn.content, turn.input) for turn in record.messages]
    pieces = []
    for turn in renderer.trained_turns(messages, Loss(), parse_tools(record.tools)):
        prompt = encoder.prompts([turn.prompt])[0]
        answer = encoder.continuations([turn.answer])[0]
        end = [encoder.eos] if turn.ends and encoder.eos is not None else []
        tokens = np.concatenate([prompt, answer, np.asarray(end, dtype=np.int32)])
        pieces.append(Piece(tokens, len(prompt), len(turn.answer)))
    return pieces


# -- pieces to rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """The pieces that are measured."""

    pieces: list[Piece]
    num_records: int
    num_too_long: int


def take(found: Iterable[list[Piece] | None], max_tokens: int) -> Taken:
    """Take whole pieces until `max_tokens` are scored; the piece that reaches the limit is the last one."""
    pieces: list[Piece] = []
    num_records = num_too_long = scored = 0
    for record in found:
        num_records += 1
        num_too_long += record is None
        for piece in record or ():
            pieces.append(piece)
            scored += len(piece.tokens) - piece.scored_from
            if scored >= max_tokens:
                return Taken(pieces, num_records, num_too_long)
    return Taken(pieces, num_records, num_too_long)


def pack(pieces: Sequence[Piece], sequence_length: int) -> list[Row]:
    """Put pieces into rows of at most `sequence_length` tokens, in order; none sees another."""
    rows: list[Row] = []
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + len(piece.tokens) > sequence_length:
            rows.append(_row(group))
            group, size = [], 0
        group.append(piece)
        size += len(piece.tokens)
    return [*rows, _row(group)] if group else rows


def _row(pieces: Sequence[Piece]) -> Row:
    return Row(
        tokens=np.concatenate([piece.tokens for piece in pieces]),
        labels=np.concatenate([_labels(piece) for piece in pieces]),
        lengths=tuple(len(piece.tokens) for piece in pieces),
    )


def _labels(piece: Piece) -> Ids:
    """Return the targets [T]: the next token where it is scored."""
    labels = np.full(len(piece.tokens), IGNORE, dtype=np.int32)
    labels[piece.scored_from - 1 : -1] = piece.tokens[piece.scored_from :]
    return labels
