"""Sentences about records and files, of bounded length."""

from __future__ import annotations

from collections.abc import Iterable

MAX_REASON = 300
"""Characters of the reason why one record was not read."""

MAX_NAMED = 12
"""Names listed in a sentence."""


def shortened(text: str, most: int = MAX_REASON) -> str:
    """Return a text of at most `most` characters, which ends at a word and shows that it was cut."""
    if len(text) <= most:
        return text
    cut = text[: most - 1]
    at_word = cut.rsplit(" ", 1)[0]
    return (at_word if len(at_word) > most // 2 else cut).rstrip(" ,;:") + "…"


def listed(names: Iterable[str], most: int = MAX_NAMED) -> str:
    """Return names in one line: the first of them, and how many more there are."""
    every = list(names)
    more = [f"{len(every) - most:,} more"] if len(every) > most else []
    return ", ".join([*(shortened(name, 60) for name in every[:most]), *more])
