"""Rewards by rules on the text, against closed forms."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.rewards import RewardTerm
from stagecoach_trainer.rewards import RewardSum
from stagecoach_trainer.rewards.arithmetic import arithmetic_value, equations
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_context
from tests.trainer.rewards.makers import make_judged


def value(tmp_path: Any, answer: str, **member: Any) -> float:
    terms = (RewardTerm.model_validate({"name": "t", **member}),)
    (judgement,) = RewardSum.build(terms, make_context(tmp_path, "ppo")).score([make_judged(answer)])
    return judgement.terms["t"]


@pytest.mark.parametrize(
    ("length", "expected"), [(0, -1.0), (5, -0.5), (10, 0.0), (15, 0.0), (20, 0.0), (25, -0.25), (40, -1.0), (90, -1.0)]
)
def test_length_falls_in_a_straight_line_outside_its_limits(tmp_path: Any, length: int, expected: float) -> None:
    assert value(tmp_path, "字" * length, length={"atLeast": 10, "atMost": 20}) == expected


def test_length_without_limits_is_always_fitting(tmp_path: Any) -> None:
    assert value(tmp_path, "", length={}) == 0.0
    assert value(tmp_path, "x" * 10000, length={"atLeast": 1}) == 0.0


@pytest.mark.parametrize(
    ("script", "answer", "expected"),
    [
        ("cjk", "白日 ab", 0.5),
        ("cjk", "白日，", 2 / 3),
        ("latin", "白日 ab\n", 0.5),
        ("alphanumeric", "a1！ 白", 0.75),
        ("cjk", "", 0.0),
        ("latin", " \n", 0.0),
    ],
)
def test_language_is_the_share_of_characters_of_a_script(
    tmp_path: Any, script: str, answer: str, expected: float
) -> None:
    assert value(tmp_path, answer, language={"script": script}) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("answer", "ngram", "expected"),
    [("abcd", 4, 0.0), ("abc", 4, 0.0), ("aaaaa", 1, -0.8), ("aaaaa", 4, -0.5), ("ababab", 2, -0.6), ("", 1, 0.0)],
)
def test_repetition_is_the_share_of_ngrams_seen_before(tmp_path: Any, answer: str, ngram: int, expected: float) -> None:
    assert value(tmp_path, answer, repetition={"ngram": ngram}) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("answer", "expected"), [("the answer: 42", 1.0), ("the answer: none", 0.0), ("", 0.0)])
def test_format_is_one_where_the_pattern_is_found(tmp_path: Any, answer: str, expected: float) -> None:
    assert value(tmp_path, answer, format={"match": r"answer: \d+$"}) == expected


def test_a_pattern_that_would_take_forever_elsewhere_does_not(tmp_path: Any) -> None:
    assert value(tmp_path, "a" * 50_000 + "!", format={"match": "^(a+)+$"}) == 0.0


def test_an_expression_sees_the_answers_figures(tmp_path: Any) -> None:
    text = "characters + 100 * words + 1000 * tokens + 10000 * ended + 100000 * promptCharacters"
    assert value(tmp_path, "a fox", expression=text) == 5 + 200 + 5000 + 10000 + 1300000


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("12 + 7 = 19", [True]),
        ("12+7=20", [False]),
        ("So 12 + 7 = 19.", [True]),
        ("2 + 3 * 4 = 14 and (2 + 3) * 4 = 20", [True, True]),
        ("10 - 2 - 3 = 5", [True]),
        ("100 / 8 / 2 = 6.25", [True]),
        ("10 / 3 = 3.33", [False]),
        ("0.1 + 0.2 = 0.3", [True]),
        ("1,234 + 1 = 1,235", [True]),
        ("3 × 4 = 12，12 ÷ 4 = 3", [True, True]),
        ("１２＋７＝１９。（２＋３）×４＝２１", [True, False]),
        ("12 + 7 = 19个苹果", [True]),
        ("一共 3*5=15 元，还剩 20-15=5 元", [True, True]),
        ("1 + 1 = 2 = 4 - 2", [True, True]),
        ("1 + 1 = 3 = 4 - 1", [False, True]),
        ("1 / 0 = 7", [False]),
        ("-3 + 5 = 2", [True]),
        ("2 * -3 = -6", [True]),
        ("7 = 3 + 4", [True]),
        ("20 * 50% = 10", [True]),
        ("1. 2 + 3 = 5\n2. 4 + 4 = 9", [True, False]),
        ("2 + 3 = 5 4 + 4 = 8", [True, True]),
        ("5 apples + 3 = 8", []),
        ("x + 2 = 5", []),
        ("x - 3 + 5 = 2", []),
        ("x-3+5=2", []),
        ("2x + 3 = 5", []),
        ("5 = 2 + 3x", []),
        ("x1 + 2 = 3", []),
        ("2^3 + 1 = 9", []),
        ("2 ** 3 = 8", []),
        ("10 / 3 ≈ 3.33", []),
        ("2(3 + 4) = 14", []),
        ("4 = 4", []),
        ("2 + 3 =\n5", []),
        ("((1 + 2) = 3", []),
        ("1 + = 2", []),
        ("(" * 60 + "1 + 1" + ")" * 60 + " = 2", []),
        ("9" * 70 + " + 1 = 2", []),
        ("", []),
    ],
)
def test_equations_are_found_and_computed_exactly(answer: str, verdicts: list[bool]) -> None:
    assert list(equations(answer)) == verdicts
    wrong, right = verdicts.count(False), verdicts.count(True)
    assert arithmetic_value(answer) == ((right - wrong) / len(verdicts) if verdicts else 0.0)


sums = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=6,
)


@given(sums, sums)
def test_sums_are_those_python_computes_with_fractions(left: str, right: str) -> None:
    import re

    def exact(text: str) -> Fraction:
        value: Fraction = eval(re.sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction})  # noqa: S307  # the oracle
        return value

    try:
        expected = exact(left) == exact(right)
    except ZeroDivisionError:
        expected = False
    found = list(equations(f"{left} = {right}"))
    assert found == ([expected] if "(" in left + right else [])


@given(st.text(alphabet="0123456789+-*/=(). x\n×＝", max_size=80))
def test_any_text_has_a_value_between_minus_one_and_one(text: str) -> None:
    assert -1.0 <= arithmetic_value(text) <= 1.0


def test_an_endless_answer_takes_linear_time() -> None:
    assert arithmetic_value("1 + " * 50_000 + "1 = 2") == -1.0
    assert arithmetic_value("1 " * 50_000 + "= 1 + 1") == -1.0
    assert arithmetic_value("= " * 50_000) == 0.0


def test_an_expression_without_a_value_names_term_and_answer(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"rewards\[0\]\.expression: '1 / words' has no value for sample 0 \(prompt "):
        value(tmp_path, "", expression="1 / words")
