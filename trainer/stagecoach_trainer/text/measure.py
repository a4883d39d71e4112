"""Measure a vocabulary on text: tokens per character, round trips, agreement of its encoders, changed encodings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from stagecoach_trainer.text.pieces import CONTROL, NORMAL, Vocabulary, unreachable_pieces
from stagecoach_trainer.text.vocabulary import batches_of, encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 1 << 18
MAX_EXAMPLES = 20

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two blanks in front, two behind  ",
    "def add(a, b):\n    return a + b\n",
    "\tif (x == 0) {\n\t\treturn   -1;\n\t}\n",
    "for i in range(10):  # ten times\n        print(i, i ** 2)\n",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '{"name": "add", "arguments": {"a": 1, "b": [2, 3, 4]}}',
    '<html><body class="main">Hello &amp; goodbye</body></html>',
    "https://example.com/path?query=1&lang=en#top",
    "3.14159 and 1,000,000 and 2024-01-31 and 0xFF and 1e-5",
    "10 20 100 200 1000 2008 2016",
    "Dr. Smith's e-mail (it's private) -- don't tell!",
    "a" + " " * 37 + "b",
    " " * 16 + "sixteen",
    "line one\n\nline three\r\nline four",
    "...... ??? !!! --- *** ___ ==> :=",
    "$x^2 + y^2 = z^2$ \\frac{1}{2} \\alpha",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789",
    "白日依山尽，黄河入海流。",
    "中英文 mixed 在一起 with 数字 123 和标点：“引号”、《书名》……",
    "\u3000\u3000全角空格与繁體字",
    "emoji 😀👍🏽 and 👨‍👩‍👧",
    "naïve café — Zürich, ¿qué?",
    "Привет мир, こんにちは, 안녕하세요",
    "<s> </s> <unk> <0x0A>",
)
"""Texts on which every vocabulary is measured. The counts are reported, so editing a text changes artifacts."""


@dataclass
class EncodingCounts:
    """Counts over a set of texts."""

    texts: int = 0
    characters: int = 0
    tokens_before: int | None = None
    """Tokens under the base vocabulary. None if there is no base."""

    tokens: int = 0
    round_trip_failures: int = 0
    """Texts that decoding their tokens does not restore, because of normalisation or the character U+2581."""

    disagreements: int = 0
    """Texts that SentencePiece and transformers encode differently."""

    examples: list[str] = field(default_factory=list)
    """Beginnings of texts with disagreements."""

    ascii_lines: int = 0
    ascii_changed: int = 0
    """ASCII lines that the base encodes with different ids."""

    def as_json(self) -> dict[str, Any]:
        has_base = self.tokens_before is not None
        return {
            "texts": self.texts,
            "characters": self.characters,
            "tokensBefore": self.tokens_before,
            "tokens": self.tokens,
            "tokensPerCharacterBefore": _ratio(self.tokens_before, self.characters) if has_base else None,
            "tokensPerCharacter": _ratio(self.tokens, self.characters),
            "roundTripFailures": self.round_trip_failures,
            "disagreements": self.disagreements,
            "disagreementExamples": self.examples,
            "asciiLines": self.ascii_lines if has_base else None,
            "asciiChanged": self.ascii_changed if has_base else None,
        }


def _ratio(count: int | None, whole: int) -> float | None:
    return round(count / whole, 6) if count is not None and whole else None


class EncodingMeter:
    """Encodes text with the base and the new vocabulary, by SentencePiece and transformers, and counts.

    Args:
        base: The vocabulary that was extended, if any.
        vocabulary: The new vocabulary.
        tokenizer: The new vocabulary, loaded from its folder by transformers.
    """

    def __init__(self, base: Vocabulary | None, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerFast) -> None:
        self._base = None if base is None else base.processor()
        self._new = vocabulary.processor()
        self._tokenizer = tokenizer
        self.uses = np.zeros(vocabulary.size, dtype=np.int64)
        """Occurrences of each id in all measured texts: int64 [V]."""

    def measure(self, texts: Iterable[str]) -> EncodingCounts:
        """Return the counts over `texts`, using bounded memory."""
        result = EncodingCounts(tokens_before=None if self._base is None else 0)
        for batch in batches_of(texts, BATCH_CHARACTERS):
            self._measure_batch(batch, result)
        return result

    def count_uses(self, texts: Iterable[str]) -> int:
        """Add the ids of `texts` to `uses`; return the number of characters."""
        characters = 0
        for batch in batches_of(texts, BATCH_CHARACTERS):
            characters += sum(map(len, batch))
            for ids in self._new.encode(batch):
                np.add.at(self.uses, ids, 1)
        return characters

    def _measure_batch(self, batch: list[str], result: EncodingCounts) -> None:
        result.texts += len(batch)
        result.characters += sum(map(len, batch))
        encoded = self._new.encode(batch)
        others = encode_batch(self._tokenizer, batch)
        for text, ids, other in zip(batch, encoded, others, strict=True):
            result.tokens += len(ids)
            np.add.at(self.uses, ids, 1)
            if ids != other.tolist():
                result.disagreements += 1
                if len(result.examples) < MAX_EXAMPLES:
                    result.examples.append(text[:200])
            result.round_trip_failures += not self._round_trips(text, ids)
        if self._base is not None and result.tokens_before is not None:
            result.tokens_before += sum(map(len, self._base.encode(batch)))
            lines = [line for text in batch for line in text.split("\n") if line.strip() and line.isascii()]
            result.ascii_lines += len(lines)
            pairs = zip(self._base.encode(lines), self._new.encode(lines), strict=True)
            result.ascii_changed += sum(old != new for old, new in pairs)

    def _round_trips(self, text: str, ids: list[int]) -> bool:
        decoded = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return bool(decoded == text and self._new.decode(ids) == text)


def piece_facts(
    base: Vocabulary | None, vocabulary: Vocabulary, uses: np.ndarray[Any, np.dtype[np.int64]], characters: int
) -> dict[str, Any]:
    """Return the report's entry about the pieces.

    Args:
        base: The vocabulary that was extended; pieces after its last id are new. If it is None, all are new.
        vocabulary: The new vocabulary.
        uses: Occurrences of each id: [V].
        characters: Size of the text in which `uses` were counted.
    """
    first_new = 0 if base is None else base.size
    new = [
        (index, piece.piece)
        for index, piece in enumerate(vocabulary.model.pieces)
        if index >= first_new and piece.type == NORMAL
    ]
    unreachable, without_split = unreachable_pieces(vocabulary)
    unseen = [piece for index, piece in new if uses[index] == 0]
    types = [piece.type for piece in vocabulary.model.pieces[first_new:]]
    return {
        "base": None if base is None else base.size,
        "total": vocabulary.size,
        "new": len(new),
        "newSpecial": types.count(CONTROL),
        "algorithm": vocabulary.algorithm,
        "normalization": vocabulary.model.normalizer_spec.name,
        "unreachable": {
            "count": len(unreachable),
            "withoutSplit": len(without_split),
            "examples": unreachable[:MAX_EXAMPLES],
        },
        "unseen": {"count": len(unseen), "ofCharacters": characters, "examples": unseen[:MAX_EXAMPLES]},
    }
