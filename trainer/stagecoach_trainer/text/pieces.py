"""SentencePiece models as lists of pieces: load, train, merge, extend. Ids are positions; existing ids never change."""

from __future__ import annotations

import io
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from stagecoach_api.kinds.tokenizer import Algorithm, MergedCharacters, MergedScore, TrainVocabulary
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.vocabulary import META_SPACE

protocol: Any = sentencepiece_model_pb2
"""SentencePiece's protobuf messages. Their classes are created at import, so the type checker does not see them."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE, UNUSED = 1, 2, 3, 4, 6, 5
"""Types of pieces in sentencepiece_model.proto."""

UNIGRAM, BPE = 1, 2
"""Types of models in sentencepiece_model.proto."""

LOWEST_ORDINARY_SCORE = -1e8
"""LLaMA's 16 pieces that consist of spaces have the score -1e9, so that they are merged last. float32 has steps of 64
there, so new scores, in steps of 1, must not start below them."""

LOWEST_COVERAGE = 0.98
"""SentencePiece rejects a lower coverage."""

UNIGRAM_STEP = 1 / 32
"""Trained unigram scores are rounded to multiples of this, so that sums over texts of about 40,000 tokens are exact in
float32 (SentencePiece) and float64 (tokenizers) alike. Unrounded, the two differ on long texts and on ties."""

SPELLING = "<>/|_-[]abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""Characters of control and byte pieces. A unigram vocabulary must contain them: if one is unknown, tokenizers encodes
the text `<s>` as the control piece."""

MAX_SENTENCE_CHARACTERS = 4000
"""Longer lines are split for training: SentencePiece silently skips lines of more than 4,192 bytes."""

# Han characters of the Basic Multilingual Plane, optionally after a space. With this pattern, merging Chinese-LLaMA's
# vocabulary into LLaMA's gives 49,139 pieces.
_CJK_PIECE = re.compile(f"{META_SPACE}?[\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model."""

    model: Any
    """The `ModelProto`. It is never changed in place: every change makes a copy."""

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each piece, by id."""
        return [piece.piece for piece in self.model.pieces]

    @property
    def size(self) -> int:
        return len(self.model.pieces)

    @property
    def is_bpe(self) -> bool:
        return bool(self.model.trainer_spec.model_type == BPE)

    @property
    def algorithm(self) -> str:
        return "bpe" if self.is_bpe else "unigram"

    def serialize(self) -> bytes:
        """Return `tokenizer.model`'s bytes; equal models give equal bytes."""
        return bytes(self.model.SerializeToString(deterministic=True))

    def processor(self) -> SentencePieceProcessor:
        """Return SentencePiece's own encoder of this vocabulary."""
        return SentencePieceProcessor(model_proto=self.serialize())


def load_vocabulary(path: Path) -> Vocabulary:
    """Load a `.model` file. Raises UserError if it is not one, or is of a kind that tokenizers cannot express."""
    try:
        return parse_vocabulary(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def parse_vocabulary(data: bytes, where: str) -> Vocabulary:
    """Parse a model's bytes; `where` is their name in messages. Raises UserError as `load_vocabulary` does."""
    from google.protobuf.message import DecodeError

    model = protocol.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise UserError(f"{where}: not a SentencePiece model: {error}") from error
    if not model.pieces or not any(piece.type == UNKNOWN for piece in model.pieces):
        raise UserError(f"{where}: not a SentencePiece model: it has no pieces, or no unknown piece")
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UserError(f"{where}: a SentencePiece model of type word or char; allowed are bpe and unigram")
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        raise UserError(f"{where}: whitespace as a suffix, or not escaped, cannot be expressed in tokenizer.json")
    return Vocabulary(model)


# -- training ----------------------------------------------------------------------------------------------------------


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Split texts into the sentences that SentencePiece trains on: lines, long ones split, blank ones left out."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                part = line[start : start + MAX_SENTENCE_CHARACTERS].replace("\0", "")
                if part.strip():
                    yield part


def train_vocabulary(config: TrainVocabulary, lines: Sequence[str], where: str) -> Vocabulary:
    """Train a vocabulary with LLaMA's settings: byte fallback, a prepended space, whitespace kept unchanged.

    Training uses one thread, so that the result depends on the lines and the settings alone.

    Raises:
        UserError: The text is empty, or has too few or too many distinct characters for the requested size.
    """
    if not lines:
        raise UserError(f"{where}.data: there is no text to train a vocabulary on; give sources with text")
    if config.character_coverage < LOWEST_COVERAGE:
        raise UserError(
            f"{where}.characterCoverage: {config.character_coverage} is too low; allowed are {LOWEST_COVERAGE} to 1"
        )
    is_unigram = config.algorithm is Algorithm.UNIGRAM
    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=config.algorithm.value,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name=config.normalization.value,
            split_digits=config.split_digits,
            required_chars=SPELLING if is_unigram else "",
            byte_fallback=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # In bytes; a character has up to 4 in UTF-8, so no sentence is skipped.
            max_sentence_length=4 * MAX_SENTENCE_CHARACTERS + 16,
            num_threads=1,
            input_sentence_size=0,  # no subsampling: `maxSentences` has already drawn the sample
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_advice(str(error), config, where)) from error
    trained = parse_vocabulary(written.getvalue(), where)
    return _rounded(trained) if is_unigram else trained


def _rounded(vocabulary: Vocabulary) -> Vocabulary:
    model = protocol.ModelProto()
    model.CopyFrom(vocabulary.model)
    for piece in model.pieces:
        piece.score = round(piece.score / UNIGRAM_STEP) * UNIGRAM_STEP
    return Vocabulary(model)


def _training_advice(message: str, config: TrainVocabulary, where: str) -> str:
    # SentencePiece reports these mistakes in the text of a RuntimeError only.
    size = config.vocab_size
    needed = re.search(r"required_chars\.\s*(\d+)\s*vs\s*(\d+)", message)
    if needed:
        return (
            f"{where}.vocabSize: {size:,} pieces are too few: the text's characters at characterCoverage "
            f"{config.character_coverage} and the 259 control and byte pieces need {int(needed.group(2)):,}; "
            "raise vocabSize or lower characterCoverage (rarer characters then fall back to bytes)"
        )
    most = re.search(r"value\s*<=\s*(\d+)", message)
    if most or "too high" in message:
        limit = f"; at most {int(most.group(1)):,} can be made" if most else ""
        return (
            f"{where}.vocabSize: {size:,} pieces are too many for this text{limit}; lower vocabSize or give more text"
        )
    reason = message.strip().splitlines()[-1] if message.strip() else "no reason given"
    return f"{where}: SentencePiece could not train {size:,} pieces ({reason}); change vocabSize or the text"


# -- changing ----------------------------------------------------------------------------------------------------------


def merge_vocabularies(
    base: Vocabulary, other: Vocabulary, characters: MergedCharacters, score: MergedScore
) -> Vocabulary:
    """Append to `base` the ordinary pieces of `other` that it lacks, in `other`'s order.

    Args:
        base: Its ids and scores do not change.
        other: Its control, byte and unknown pieces are left out.
        characters: `cjk` takes only pieces of Han characters, optionally after a space.
        score: `below` the lowest ordinary score of `base` in steps of 1, or `zero`.

    Raises:
        UserError: `base` is a unigram model, in which pieces of lower scores would never be chosen.
    """
    if not base.is_bpe:
        raise UserError("merge: the base is a unigram vocabulary, in which appended pieces are never chosen; use bpe")
    known = set(base.pieces)
    new = [
        piece.piece
        for piece in other.model.pieces
        if piece.type == NORMAL
        and piece.piece not in known
        and (characters is MergedCharacters.ALL or _CJK_PIECE.fullmatch(piece.piece))
    ]
    return _append(base, new, NORMAL, zero=score is MergedScore.ZERO)


def add_characters(base: Vocabulary, characters: str) -> Vocabulary:
    """Append each character that the vocabulary lacks, in order, except whitespace."""
    known = set(base.pieces)
    wanted = dict.fromkeys(character for character in characters if not character.isspace() and character != META_SPACE)
    return _append(base, [character for character in wanted if character not in known], NORMAL)


def add_special_tokens(base: Vocabulary, tokens: Sequence[str], pad_token: str | None) -> Vocabulary:
    """Append control pieces, which are never split and never produced from text.

    Tokens that are already control pieces keep their ids. Raises UserError for a token that is an ordinary piece.
    """
    types = {piece.piece: piece.type for piece in base.model.pieces}
    wanted = dict.fromkeys([*tokens, *([pad_token] if pad_token else [])])
    for token in wanted:
        if types.get(token, CONTROL) != CONTROL:
            raise UserError(
                f"add: {token!r} is an ordinary piece of the base, so text produces it; choose another name"
            )
        if token != token.strip() or META_SPACE in token:
            raise UserError(
                f"add: the special token {token!r} has whitespace at an end, or U+2581; choose another name"
            )
    grown = _append(base, [token for token in wanted if token not in types], CONTROL, zero=True)
    if pad_token:
        # SentencePiece finds the padding piece by these two fields. They are set in place, which is safe because
        # `_append` has just made this copy.
        grown.model.trainer_spec.pad_piece = pad_token
        grown.model.trainer_spec.pad_id = grown.pieces.index(pad_token)
    return grown


def append_tokens(base: Vocabulary, tokens: Sequence[tuple[str, bool]]) -> Vocabulary:
    """Append (token, is special) in order, such as the tokens that a Hugging Face folder adds to the model's pieces."""
    grown = base
    for token, special in tokens:
        # One by one: ids follow the order of the tokens, in which special and ordinary ones may alternate.
        grown = _append(grown, [token], CONTROL if special else USER_DEFINED, zero=True)
    return grown


def _append(base: Vocabulary, pieces: Sequence[str], kind: int, zero: bool = False) -> Vocabulary:
    model = protocol.ModelProto()
    model.CopyFrom(base.model)
    lowest = lowest_score(base)
    # Lower scores than the base's, so that BPE applies the base's merges first.
    for index, piece in enumerate(pieces):
        model.pieces.add(piece=piece, type=kind, score=0.0 if zero else lowest - 1 - index)
    model.trainer_spec.vocab_size = len(model.pieces)
    return Vocabulary(model)


def lowest_score(vocabulary: Vocabulary) -> float:
    """Return the lowest score of an ordinary piece, except LLaMA's runs of spaces at -1e9."""
    scores = [piece.score for piece in vocabulary.model.pieces if piece.type == NORMAL]
    return min((score for score in scores if score > LOWEST_ORDINARY_SCORE), default=0.0)


# -- facts about pieces ------------------------------------------------------------------------------------------------


def splits_of(piece: str, known: Container[str]) -> list[tuple[str, str]]:
    """Return the pairs of known pieces that concatenate to `piece`, the longest left part first."""
    pairs = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in pairs if left in known and right in known]


def unreachable_pieces(vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """Return the ordinary pieces that BPE can never produce, and those of them that no two pieces concatenate to.

    A piece is reachable if it is one character, or the concatenation of two reachable pieces.
    """
    if not vocabulary.is_bpe:
        return [], []
    known = {piece.piece for piece in vocabulary.model.pieces if piece.type == NORMAL}
    reachable: set[str] = set()
    for piece in sorted(known, key=len):  # the parts of a piece are shorter, hence decided before it
        if len(piece) == 1 or splits_of(piece, reachable):
            reachable.add(piece)
    unreachable = [piece for piece in vocabulary.pieces if piece in known and piece not in reachable]
    return unreachable, [piece for piece in unreachable if not splits_of(piece, known)]
