"""A small language for rewards: a formula over properties of an answer, parsed against an allowlist.

Python's parser parses the text, but no Python code is run: each allowed node becomes a function of this module, and any
other node is rejected with its position. Values are numbers; comparisons and `and`, `or`, `not` give 1 or 0.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

MAX_NODES = 256
MAX_DEPTH = 32
MAX_CONSTANT = 1e12

ALLOWED = (
    "numbers, + - * / ( ), comparisons, and or not, `x if c else y`, min max abs log exp sqrt, characters words lines "
    'tokens ended promptCharacters, count("…") and contains("…")'
)


class ExpressionError(ValueError):
    """The text is not an expression (the message has the position), or it has no value for an answer."""


@dataclass(frozen=True)
class Figures:
    """The properties of an answer that an expression can use."""

    answer: str
    tokens: int = 0
    """Tokens of the answer."""

    ended: bool = True
    """Whether the answer ended with an end token, rather than at the length limit."""

    prompt_characters: int = 0


Formula = Callable[[Figures], float]

VARIABLES: dict[str, Formula] = {
    "characters": lambda figures: float(len(figures.answer)),
    "words": lambda figures: float(len(figures.answer.split())),
    "lines": lambda figures: float(len(figures.answer.splitlines())),
    "tokens": lambda figures: float(figures.tokens),
    "ended": lambda figures: float(figures.ended),
    "promptCharacters": lambda figures: float(figures.prompt_characters),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, Callable[[float, float], float]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}
COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
SIGNS: dict[type[ast.unaryop], Callable[[float], float]] = {
    ast.UAdd: lambda value: value,
    ast.USub: lambda value: -value,
    ast.Not: lambda value: float(not value),
}
ONE_NUMBER: dict[str, Callable[[float], float]] = {"abs": abs, "log": math.log, "exp": math.exp, "sqrt": math.sqrt}
NUMBERS: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max}
TEXT: dict[str, Callable[[str, str], float]] = {
    "count": lambda answer, text: float(answer.count(text)),
    "contains": lambda answer, text: float(text in answer),
}
FUNCTIONS = (*NUMBERS, *ONE_NUMBER, *TEXT)


@dataclass(frozen=True)
class Expression:
    """A parsed formula."""

    text: str
    formula: Formula

    def value(self, figures: Figures) -> float:
        """Return the value for one answer. Raises ExpressionError if it is undefined: 1 / 0, log(0), exp(1000)."""
        try:
            return self.formula(figures)
        except ZeroDivisionError as error:
            raise ExpressionError("division by 0; write `max(1, …)` around the divisor") from error
        except OverflowError as error:
            raise ExpressionError("a number is too large; write `min(…, 100)` around what grows") from error
        except ValueError as error:
            raise ExpressionError("log or sqrt is not defined for its argument; write `max(1, …)` inside") from error


def parse_expression(text: str) -> Expression:
    """Parse an expression. Raises ExpressionError with the position (from 1), what was got and what is allowed."""
    source = " ".join(text.split("\n")).strip()
    tree = _syntax(source)
    return Expression(text, _Reader(source).read(tree.body, 1))


def _syntax(source: str) -> ast.Expression:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about style, such as `1if x else 2`
            return ast.parse(source, mode="eval")
    except SyntaxError as error:
        place = error.offset or len(source) + 1
        raise ExpressionError(f"position {place}: {error.msg}; allowed are {ALLOWED}") from error
    except (ValueError, MemoryError, RecursionError) as error:
        raise ExpressionError(f"cannot be parsed: nested too deeply, or not text; allowed are {ALLOWED}") from error


class _Reader:
    """Converts the nodes of one expression into functions."""

    def __init__(self, source: str) -> None:
        self._bytes = source.encode()
        self._nodes = 0
        self._readers: dict[type[ast.expr], Callable[[Any, int], Formula]] = {
            ast.Constant: self._number,
            ast.Name: self._variable,
            ast.UnaryOp: self._sign,
            ast.BinOp: self._arithmetic,
            ast.BoolOp: self._logic,
            ast.Compare: self._comparison,
            ast.IfExp: self._choice,
            ast.Call: self._call,
        }

    def read(self, node: ast.expr, depth: int) -> Formula:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._reject(node, f"more than {MAX_NODES} parts", "a shorter formula")
        if depth > MAX_DEPTH:
            self._reject(node, f"more than {MAX_DEPTH} levels", "a flatter formula")
        for kind, reader in self._readers.items():
            if isinstance(node, kind):
                return reader(node, depth)
        return self._reject(node, type(node).__name__)

    def _reject(self, node: ast.expr, got: str, allowed: str = ALLOWED) -> NoReturn:
        # `col_offset` counts bytes of UTF-8; people count characters.
        position = len(self._bytes[: node.col_offset].decode(errors="replace")) + 1
        raise ExpressionError(f"position {position}: got {got}; allowed are {allowed}")

    def _number(self, node: ast.Constant, depth: int) -> Formula:
        if type(node.value) not in (int, float):
            self._reject(node, f"{type(node.value).__name__} {node.value!r:.40}")
        try:
            value = float(node.value)  # type: ignore[arg-type]
        except OverflowError:
            value = math.inf
        if not value <= MAX_CONSTANT:
            self._reject(node, "a huge number", f"numbers up to {MAX_CONSTANT:g}")
        return lambda figures: value

    def _variable(self, node: ast.Name, depth: int) -> Formula:
        if node.id not in VARIABLES:
            self._reject(node, f"the name `{node.id}`", f"{', '.join(VARIABLES)}; functions: {', '.join(FUNCTIONS)}")
        return VARIABLES[node.id]

    def _sign(self, node: ast.UnaryOp, depth: int) -> Formula:
        if type(node.op) not in SIGNS:
            self._reject(node, f"the sign {type(node.op).__name__}", "the signs + - and not")
        inner, sign = self.read(node.operand, depth + 1), SIGNS[type(node.op)]
        return lambda figures: sign(inner(figures))

    def _arithmetic(self, node: ast.BinOp, depth: int) -> Formula:
        if type(node.op) not in ARITHMETIC:
            self._reject(node, f"the operator {type(node.op).__name__}", "the operators + - * /")
        left, right = self.read(node.left, depth + 1), self.read(node.right, depth + 1)
        _, apply = ARITHMETIC[type(node.op)]
        return lambda figures: apply(left(figures), right(figures))

    def _logic(self, node: ast.BoolOp, depth: int) -> Formula:
        parts = [self.read(value, depth + 1) for value in node.values]
        decide = all if isinstance(node.op, ast.And) else any
        return lambda figures: float(decide(part(figures) for part in parts))

    def _comparison(self, node: ast.Compare, depth: int) -> Formula:
        for kind in node.ops:
            if type(kind) not in COMPARISONS:
                self._reject(node, f"the comparison {type(kind).__name__}", "the comparisons == != < <= > >=")
        parts = [self.read(part, depth + 1) for part in (node.left, *node.comparators)]
        tests = [COMPARISONS[type(kind)] for kind in node.ops]

        def compare(figures: Figures) -> float:
            values = [part(figures) for part in parts]
            return float(all(test(*pair) for test, pair in zip(tests, pairwise(values), strict=True)))

        return compare

    def _choice(self, node: ast.IfExp, depth: int) -> Formula:
        condition, then, other = (self.read(part, depth + 1) for part in (node.test, node.body, node.orelse))
        return lambda figures: then(figures) if condition(figures) else other(figures)

    def _call(self, node: ast.Call, depth: int) -> Formula:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            got = (
                f"a call of `{node.func.id}`"
                if isinstance(node.func, ast.Name)
                else "a call of something that is not a name"
            )
            self._reject(node, got, f"the functions {', '.join(FUNCTIONS)}")
        name = node.func.id
        if node.keywords or any(isinstance(item, ast.Starred) for item in node.args):
            self._reject(node, f"named or starred arguments of `{name}`", "plain arguments")
        if name in TEXT:
            return self._text_call(node, name)
        return self._number_call(node, name, [self.read(item, depth + 1) for item in node.args])

    def _text_call(self, node: ast.Call, name: str) -> Formula:
        wanted = node.args[0].value if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) else None
        if not isinstance(wanted, str) or not wanted:
            self._reject(node, f"`{name}` of something else", f'one non-empty text: {name}("…")')
        text, apply = wanted, TEXT[name]
        return lambda figures: apply(figures.answer, text)

    def _number_call(self, node: ast.Call, name: str, parts: list[Formula]) -> Formula:
        if name in NUMBERS:
            if len(parts) < 2:
                self._reject(node, f"`{name}` of {len(parts)}", f"two or more arguments of `{name}`")
            choose = NUMBERS[name]
            return lambda figures: choose([part(figures) for part in parts])
        if len(parts) != 1:
            self._reject(node, f"`{name}` of {len(parts)}", f"one argument of `{name}`")
        (inner,), apply = parts, ONE_NUMBER[name]
        return lambda figures: float(apply(inner(figures)))
