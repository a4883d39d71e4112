"""Text in which a record's author spells special tokens: hide it from the template, and find it in the rendering.

A rendering alone does not show which `</s>` the template wrote and which one the author. So the author's are replaced
by marks before rendering; if the rendering with the marks put back is the real one, the marks show where they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagecoach_trainer.text.messages import Message, strings_of, with_strings


@dataclass(frozen=True)
class Piece:
    """A part of a rendered turn."""

    text: str
    is_plain: bool = False
    """Whether the spelling of a special token in it is ordinary text."""


@dataclass
class Marks:
    """Marks in place of texts; letters and digits only, so that a template passes them on as they are."""

    stem: str
    _hidden: list[str] = field(default_factory=list)

    def hide(self, text: str) -> str:
        """Return a new mark that represents `text`."""
        self._hidden.append(text)
        return f"{self.stem}{len(self._hidden) - 1}x"

    def pieces(self, rendered: str) -> tuple[Piece, ...]:
        """Return a rendering with the hidden texts put back, as pieces of their own."""
        parts = re.split(f"{self.stem}(\\d+)x", rendered)
        # `split` returns texts and numbers in turn.
        found = [
            Piece(self._hidden[int(part)], is_plain=True) if index % 2 else Piece(part)
            for index, part in enumerate(parts)
        ]
        return tuple(piece for piece in found if piece.text)


class Spellings:
    """The texts of a vocabulary's special tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        # The longest first: a token may begin with another one.
        self.tokens = tuple(sorted(set(tokens), key=lambda token: (-len(token), token)))
        self._first = {token[0] for token in self.tokens}
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")

    def with_token(self, token: str) -> Spellings:
        return self if token in self.tokens else Spellings([*self.tokens, token])

    def occur_in(self, text: str) -> bool:
        """Return whether `text` spells a special token."""
        # Most texts have none of the characters with which special tokens begin.
        return any(first in text for first in self._first) and self._pattern.search(text) is not None

    def occur_in_message(self, message: Message) -> bool:
        return any(self.occur_in(text) for text in strings_of(message))

    def found_in(self, text: str) -> list[re.Match[str]]:
        """Return the special tokens in a text, in order."""
        return list(self._pattern.finditer(text))

    def hidings(self, message: Message) -> Iterator[tuple[Marks, dict[str, Any]]]:
        """Yield a message with its spellings hidden, and the marks, in three ways; that which keeps texts whole first.

        A text encoded whole gets the usual ids. White space at its ends is left for templates that trim it.
        """
        stem = stem_unlike(list(strings_of(message)))
        for keeps in (_whole, _core, None):
            marks = Marks(stem)

            def spelled(text: str, marks: Marks = marks) -> str:
                return self._pattern.sub(lambda match: marks.hide(match[0]), text)

            def of_text(text: str, marks: Marks = marks, keeps: Callable[[str], str] | None = keeps) -> str:
                if keeps is None or not self.occur_in(text):
                    return spelled(text, marks)
                return text.replace(keeps(text), marks.hide(keeps(text)), 1)

            yield marks, with_strings(message, of_text, spelled)


def _whole(text: str) -> str:
    return text


def _core(text: str) -> str:
    return text.strip()


def special_spellings(tokenizer: Any) -> Spellings:
    """Return the texts of a vocabulary's special tokens, its end token among them."""
    added = tokenizer.added_tokens_decoder.values()
    end = [tokenizer.eos_token] if tokenizer.eos_token else []
    return Spellings([*(token.content for token in added if token.special and token.content), *end])


def added_spellings(tokenizer: Any) -> Spellings:
    """Return the texts of all added tokens that are not blank: some vocabularies mark no token as special."""
    added = tokenizer.added_tokens_decoder.values()
    return Spellings([token.content for token in added if token.content.strip()])


def stem_unlike(texts: Sequence[str]) -> str:
    """Return the beginning of marks; it occurs in none of the texts."""
    stem = "Qz7"
    while any(stem in text for text in texts):
        stem += "q"
    return stem


def split_at(pieces: Sequence[Piece], token: str) -> tuple[Piece, ...] | None:
    """Return the pieces before the last `token` that the template wrote, or None if it wrote none."""
    for index in range(len(pieces) - 1, -1, -1):
        position = -1 if pieces[index].is_plain else pieces[index].text.rfind(token)
        if position >= 0:
            return (*pieces[:index], Piece(pieces[index].text[:position]))
    return None
