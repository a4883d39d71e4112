"""The reward expression language: values and errors."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.expressions import ExpressionError, Figures, parse_expression

FIGURES = Figures("one two\nthree 三三", tokens=9, ended=True, prompt_characters=20)


def value(text: str, figures: Figures = FIGURES) -> float:
    return parse_expression(text).value(figures)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3 - 4 / 8", 6.5),
        ("-(2 - 5) * +2", 6.0),
        ("characters", 16.0),
        ("words", 4.0),
        ("lines", 2.0),
        ("tokens", 9.0),
        ("ended", 1.0),
        ("promptCharacters", 20.0),
        ('count("三")', 2.0),
        ('contains("two") and not contains("four")', 1.0),
        ('contains("four") or words > 4', 0.0),
        ("1 < words <= 4 < tokens", 1.0),
        ("1 < words < 4", 0.0),
        ("words == 4 != 3", 1.0),
        ("1 if ended else -1", 1.0),
        ("1 if words > 100 else -1", -1.0),
        ("min(3, words, 2) + max(1, tokens)", 11.0),
        ("abs(0 - 3) + log(1) + exp(0) + sqrt(16)", 8.0),
        ("1 / words if words else 0", 0.25),
        ("min(1,\n  words / 8)", 0.5),
        ("not words", 0.0),
        ("5 and 7", 1.0),
        ("1e-3 * 2", 0.002),
    ],
)
def test_an_expression_has_its_value(text: str, expected: float) -> None:
    assert value(text) == pytest.approx(expected, abs=1e-15)


def test_a_branch_that_is_not_taken_is_not_computed() -> None:
    empty = Figures("", ended=False)
    assert value("1 / words if words else 0", empty) == 0.0
    assert value("words and 1 / words", empty) == 0.0
    assert value("not words or 1 / words", empty) == 1.0


HOSTILE = [
    "__import__('os')",
    "__import__('os').system('id')",
    "import os",
    "os.system('id')",
    "().__class__.__bases__[0].__subclasses__()",
    "characters.__class__",
    "(1).real",
    "''.join(['a'])",
    "'a' * 1000000000",
    "'text'",
    "f'{characters}'",
    "b'bytes'",
    "lambda: 1",
    "(lambda x: x)(1)",
    "[x for x in (1, 2)]",
    "{x for x in (1, 2)}",
    "{1: 2}",
    "(x for x in (1, 2))",
    "[1, 2]",
    "(1, 2)",
    "9 ** 9 ** 9",
    "7 // 2",
    "7 % 2",
    "1 << 99999",
    "1 | 2",
    "~1",
    "1e400",
    "99999999999999",
    "9" * 4000,
    "1j",
    "True",
    "None",
    "...",
    "eval('1')",
    "exec('1')",
    "open('/etc/passwd')",
    "getattr(1, 'real')",
    "print(1)",
    "globals()",
    "characters()",
    "abs",
    "(x := 3)",
    "x = 3",
    "await characters",
    "yield 1",
    "words is words",
    "words in (1, 2)",
    "count(words)",
    "count('')",
    "count('a', 'b')",
    "count(b'a')",
    "contains(f'{words}')",
    "contains('a' 'b' + 'c')",
    "min(1)",
    "min(*(1, 2))",
    "max(1, 2, key=abs)",
    "log(1, 2)",
    "log()",
    "exp(x)",
    "words[0]",
    "1; 2",
    "1 if words",
    "#",
    "",
    "\x00",
    "(" * 500 + "1" + ")" * 500,
    "-" * 4000 + "1",
    "not " * 1000 + "1",
    "+".join(["1"] * 2000),
    "1if 1else " * 200 + "1",
]


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{index}: {text[:32]!r}" for index, text in enumerate(HOSTILE)])
def test_everything_else_is_rejected(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse_expression(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 + __import__('os')", "position 5: got a call of `__import__`; allowed are the functions min"),
        ("words + wrods", "position 9: got the name `wrods`; allowed are characters, words"),
        ("三 + 1", "position 1: got the name `三`"),
        ('contains("三三") + characters.real', "position 18: got Attribute; allowed are numbers, + - * /"),
        ("2 ** 3", "position 1: got the operator Pow; allowed are the operators + - * /"),
        ("1 +", "position 4: invalid syntax; allowed are numbers"),
        ("1e13", "position 1: got a huge number; allowed are numbers up to 1e+12"),
    ],
)
def test_an_error_has_the_position_what_was_got_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse_expression(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["1 / (words - 4)", "log(words - 4)", "sqrt(0 - 1)", "exp(tokens * 1000)"])
def test_a_formula_without_a_value_raises_an_error(text: str) -> None:
    expression = parse_expression(text)
    with pytest.raises(ExpressionError, match="write `m"):
        expression.value(FIGURES)


atoms = st.sampled_from(["words", "tokens", "1.5", "2", "ended", 'count("o")', "7"])
formulas = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "<", ">="]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"min({t[0]}, {t[1]})"),
        inner.map(lambda t: f"(-{t})"),
    ),
    max_leaves=12,
)


@given(formulas)
def test_values_agree_with_pythons_arithmetic(text: str) -> None:
    known = {"words": 4, "tokens": 9, "ended": 1, "count": FIGURES.answer.count, "min": min}
    expected = float(eval(text, {"__builtins__": {}}, known))  # noqa: S307  # the oracle, on text made here
    assert value(text) == pytest.approx(expected)


@given(st.text(max_size=60))
def test_any_text_gives_a_number_or_an_error(text: str) -> None:
    with contextlib.suppress(ExpressionError):
        assert math.isfinite(value(text))
