"""Compare two tokenizers by the ids they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PROBES = (
    "The quick brown fox, jumping over 13 lazy dogs: 3.14159 or 1,000,000?",
    "  two spaces before\tand a tab\n\n\na blank line\r\nand the end  ",
    "def f(x):\n    if x:\n        return [1, 2]  # don't\n",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "Ça n'était qu'un naïve café — “résumé” … Ελληνικά, Русский, العربية, हिन्दी, 日本語, 한국어",
    "👩‍👩‍👧 🇨🇳 e\u0301 \u200b\ufeff \x00 \u2581",
    "<s> </s> <unk> <|im_start|>user <|endoftext|> [INST] <bos>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ======== ________ 000000000000",
)
"""Texts on which tokenizers of one vocabulary differ: spaces, digits, accents, scripts, control characters, names of
special tokens."""

PROBED_TOKENS = 4096


def probe_texts(tokenizer: Any) -> list[str]:
    """Return the probes and the vocabulary's tokens: up to 4,096 tokens from all of it, 16 to a text."""
    step = max(1, len(tokenizer) // PROBED_TOKENS)
    words = [tokenizer.decode([index]) for index in range(0, len(tokenizer), step)]
    return [*PROBES, *(" ".join(words[start : start + 16]) for start in range(0, len(words), 16))]


def state_of(backend: Any) -> str:
    """Return everything that determines a fast tokenizer's ids, as JSON, without truncation and padding."""
    text: str = backend.to_str()
    if backend.truncation is None and backend.padding is None:
        return text
    plain = type(backend).from_str(text)
    plain.no_truncation()
    plain.no_padding()
    return str(plain.to_str())


def first_difference(one: Any, other: Any, texts: Sequence[str]) -> str | None:
    """Return a description of the first text to which two tokenizers give different ids; None if they agree."""
    for text in texts:
        first = one(text)["input_ids"]
        second = other(text)["input_ids"]
        if first != second:
            return f"{text[:60]!r} has ids {second[:12]} instead of {first[:12]}"
    return None
