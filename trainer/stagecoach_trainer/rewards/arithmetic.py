"""Are the sums in an answer right? Equations are found in running text and computed exactly, with fractions.

What is looked at is `number operator number … = number …`, parentheses included; what cannot be told for an equation of
plain numbers (`x + 2 = 5`, `2^3 = 8`, `≈`) does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

MAX_DIGITS = 64
MAX_DEPTH = 32

_FULL_WIDTH = str.maketrans("０１２３４５６７８９．＋－−–＊／＝（）％", "0123456789.+---*/=()%")
_SIGNS = str.maketrans("×·÷", "**/")
_TOKEN = re.compile(
    r"(?P<number>\d+(?:,\d{3}(?!\d))*(?:\.\d+)?%?)"
    r"|(?P<operator>[-+*/])|(?P<open>\()|(?P<close>\))|(?P<equals>=)"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<strange>[\^√²³‰!<>≠≤≥≈∑∫π°])"
    r"|(?P<blank>[^\S\n]+)|(?P<other>[\s\S])"
)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    spaced: bool
    """A blank stands in front of it."""


class _NotArithmetic(ValueError):
    """The tokens are no sum of plain numbers."""


def arithmetic_value(answer: str) -> float:
    """Return right equations less wrong ones, divided by all; 0 where there are none."""
    verdicts = list(equations(answer))
    return (2 * sum(verdicts) - len(verdicts)) / len(verdicts) if verdicts else 0.0


def equations(answer: str) -> Iterator[bool]:
    """Yield for every equation of the text whether it is right."""
    for segment in _segments(answer.translate(_FULL_WIDTH).translate(_SIGNS)):
        sides = _split_at_equals(segment)
        for left, right in pairwise(sides):
            verdict = _verdict(_last_chunk(left), _first_chunk(right))
            if verdict is not None:
                yield verdict


def _verdict(left: Sequence[_Token], right: Sequence[_Token]) -> bool | None:
    """Return whether both sides are equal; None where they are no sum. A quotient by zero equals nothing."""
    if not any(token.kind == "operator" for token in (*left[1:], *right[1:])):
        return None
    try:
        return _ExpressionValue(left).value() == _ExpressionValue(right).value()
    except _NotArithmetic:
        return None
    except ZeroDivisionError:
        return False


def _segments(text: str) -> Iterator[list[_Token]]:
    """Yield runs of tokens that may make equations: words, line ends and other signs part them.

    A word right beside an operator or a sum is a variable (`x-3`, `2 + 3x`), so what it touches is no plain sum.
    """
    run: list[_Token] = []
    before, spaced = "", False
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        if kind in ("word", "other"):
            if kind == "word" and not spaced and _ends_in_sum(run):
                run.append(_Token("strange", match.group(), False))
            yield run
            run = []
        elif kind != "blank":
            touches = kind == "operator" and before == "word" and not spaced
            run.append(_Token("strange" if touches else kind, match.group(), spaced))
        spaced = kind == "blank"
        before = before if spaced else kind
    yield run


def _ends_in_sum(run: Sequence[_Token]) -> bool:
    return bool(run) and any(token.kind == "operator" for token in _split_at_equals(run)[-1])


def _split_at_equals(segment: Sequence[_Token]) -> list[list[_Token]]:
    sides: list[list[_Token]] = [[]]
    for token in segment:
        if token.kind == "equals":
            sides.append([])
        else:
            sides[-1].append(token)
    return sides


def _chunks(side: Sequence[_Token]) -> list[list[_Token]]:
    """Cut a side where a number ends and another begins, as in `1. 2 + 3` or `2 + 3 = 5 4 + 4`."""
    chunks: list[list[_Token]] = [[]]
    for token in side:
        before = chunks[-1][-1].kind if chunks[-1] else ""
        if before in ("number", "close") and token.kind in ("number", "open") and token.spaced:
            chunks.append([])
        chunks[-1].append(token)
    return chunks


def _last_chunk(side: Sequence[_Token]) -> list[_Token]:
    return _chunks(side)[-1]


def _first_chunk(side: Sequence[_Token]) -> list[_Token]:
    return _chunks(side)[0]


class _ExpressionValue:
    """Computes a sum by recursive descent."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def value(self) -> Fraction:
        """Return the value. Raises _NotArithmetic unless all tokens are one sum, and ZeroDivisionError."""
        found = self._sum()
        if self._next < len(self._tokens):
            raise _NotArithmetic
        return found

    def _take(self, kind: str, texts: str = "") -> _Token | None:
        if self._next >= len(self._tokens):
            return None
        token = self._tokens[self._next]
        if token.kind != kind or (texts and token.text not in texts):
            return None
        self._next += 1
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while (sign := self._take("operator", "+-")) is not None:
            other = self._product()
            value = value + other if sign.text == "+" else value - other
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while (sign := self._take("operator", "*/")) is not None:
            other = self._factor()
            value = value * other if sign.text == "*" else value / other
        return value

    def _factor(self) -> Fraction:
        if self._take("operator", "-") is None:
            return self._plain_factor()
        if self._next < len(self._tokens) and self._tokens[self._next].spaced:
            raise _NotArithmetic  # `x - 3 = 4`: a sign stands right before its number
        return -self._plain_factor()

    def _plain_factor(self) -> Fraction:
        number = self._take("number")
        if number is not None:
            return _number(number.text)
        if self._take("open") is None or self._depth >= MAX_DEPTH:
            raise _NotArithmetic
        self._depth += 1
        value = self._sum()
        self._depth -= 1
        if self._take("close") is None:
            raise _NotArithmetic
        return value


def _number(text: str) -> Fraction:
    if len(text) > MAX_DIGITS:
        raise _NotArithmetic
    plain = text.replace(",", "")
    return Fraction(plain[:-1]) / 100 if plain.endswith("%") else Fraction(plain)
