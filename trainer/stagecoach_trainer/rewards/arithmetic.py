"""The arithmetic term: finds equations in an answer's text and checks them exactly, with fractions.

An equation has the form `number operator number … = number …`, parentheses included. Anything else, such as variables
(`x + 2 = 5`), powers (`2^3 = 8`) or `≈`, does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

MAX_DIGITS = 64
"""Longest number that is read, in characters; bounds the cost of exact fractions."""

MAX_DEPTH = 32
"""Deepest nesting of parentheses that is read; bounds the recursion."""

_FULL_WIDTH = str.maketrans("０１２３４５６７８９．＋－−–＊／＝（）％", "0123456789.+---*/=()%")
_SIGNS = str.maketrans("×·÷", "**/")
_TOKEN = re.compile(
    # A comma is part of a number only as a thousands separator, so lists like "1,2" are two numbers.
    r"(?P<number>\d+(?:,\d{3}(?!\d))*(?:\.\d+)?%?)"
    r"|(?P<operator>[-+*/])|(?P<open>\()|(?P<close>\))|(?P<equals>=)"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<unsupported>[\^√²³‰!<>≠≤≥≈∑∫π°])"
    r"|(?P<blank>[^\S\n]+)|(?P<other>[\s\S])"
)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    spaced: bool
    """Whether white space precedes it."""


class _NotArithmetic(ValueError):
    """The tokens are not an arithmetic expression of plain numbers."""


def arithmetic_value(answer: str) -> float:
    """Return (correct - wrong equations) / all equations, from -1 to 1; 0 if there are none."""
    correct = list(equations(answer))
    return (2 * sum(correct) - len(correct)) / len(correct) if correct else 0.0


def equations(answer: str) -> Iterator[bool]:
    """Yield for each equation of the text whether it is correct."""
    for segment in _segments(answer.translate(_FULL_WIDTH).translate(_SIGNS)):
        sides = _split_at_equals(segment)
        # `a = b = c` is two equations. Only the chunks next to the sign belong to it.
        for left, right in pairwise(sides):
            is_correct = _compare(_last_chunk(left), _first_chunk(right))
            if is_correct is not None:
                yield is_correct


def _compare(left: Sequence[_Token], right: Sequence[_Token]) -> bool | None:
    """Return whether both sides are equal; None if they are not arithmetic. A division by zero equals nothing."""
    # Without an operator (a leading sign does not count) it is an assignment such as `total = 5`, not a calculation.
    if not any(token.kind == "operator" for token in (*left[1:], *right[1:])):
        return None
    try:
        return _ExpressionValue(left).value() == _ExpressionValue(right).value()
    except _NotArithmetic:
        return None
    except ZeroDivisionError:
        return False


def _segments(text: str) -> Iterator[list[_Token]]:
    """Yield runs of tokens that may form equations, separated by identifiers, line ends and other characters.

    An identifier adjacent to an operator or an expression is a variable (`x-3`, `2 + 3x`), so the token it touches is
    marked as unsupported.
    """
    run: list[_Token] = []
    before, spaced = "", False
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        if kind in ("word", "other"):
            if kind == "word" and not spaced and _ends_in_expression(run):
                run.append(_Token("unsupported", match.group(), False))
            yield run
            run = []
        elif kind != "blank":
            touches = kind == "operator" and before == "word" and not spaced
            run.append(_Token("unsupported" if touches else kind, match.group(), spaced))
        spaced = kind == "blank"
        before = before if spaced else kind  # the last token that is not white space
    yield run


def _ends_in_expression(run: Sequence[_Token]) -> bool:
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
    """Split a side between two adjacent numbers, as in `1. 2 + 3` or `2 + 3 = 5 4 + 4`."""
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
    """Evaluates an expression by recursive descent.

    expression = product {(+|-) product}; product = factor {(*|/) factor}; factor = [-] (number | "(" expression ")").
    Python's `eval` is never used: the text comes from a model.
    """

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def value(self) -> Fraction:
        """Return the value. Raises _NotArithmetic unless all tokens form one expression, and ZeroDivisionError."""
        value = self._expression()
        if self._next < len(self._tokens):
            raise _NotArithmetic
        return value

    def _take(self, kind: str, texts: str = "") -> _Token | None:
        if self._next >= len(self._tokens):
            return None
        token = self._tokens[self._next]
        if token.kind != kind or (texts and token.text not in texts):
            return None
        self._next += 1
        return token

    def _expression(self) -> Fraction:
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
            raise _NotArithmetic  # the rest of `x - 3 = 4`: a sign directly precedes its number
        return -self._plain_factor()

    def _plain_factor(self) -> Fraction:
        number = self._take("number")
        if number is not None:
            return _number(number.text)
        if self._take("open") is None or self._depth >= MAX_DEPTH:
            raise _NotArithmetic
        # A chain of parentheses costs one Python frame per level, and an answer may contain thousands.
        self._depth += 1
        value = self._expression()
        self._depth -= 1
        if self._take("close") is None:
            raise _NotArithmetic
        return value


def _number(text: str) -> Fraction:
    if len(text) > MAX_DIGITS:
        raise _NotArithmetic
    plain = text.replace(",", "")
    return Fraction(plain[:-1]) / 100 if plain.endswith("%") else Fraction(plain)
