"""Rules over rewards: what is refused at the door."""

from __future__ import annotations

from typing import Any

import pytest
from reward_makers import evaluate_stage, feedback_term

from stagecoach_api.problems import InvalidRun, Problem
from stagecoach_api.validation import validate

KEY = {"secret": "judge-key"}
AT = "spec.stages[0].evaluate.rewards[0].rewards"


def problems_of(stage: dict[str, Any]) -> tuple[Problem, ...]:
    spec = {"storage": {"uri": "s3://models/demo"}, "stages": [stage]}
    document = {
        "apiVersion": "stagecoach.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "demo"},
        "spec": spec,
    }
    try:
        validate(document)
    except InvalidRun as error:
        return error.problems
    return ()


def test_sound_rewards_are_no_problem() -> None:
    terms = ({"name": "short", "expression": "min(1, 40 / max(1, characters))"}, feedback_term(**KEY))
    assert problems_of(evaluate_stage(*terms)) == ()


def judged(*names: str) -> dict[str, Any]:
    statements = [{"name": name, "text": "It is kind", "weight": 1} for name in names]
    return {
        "name": "kind",
        "propositions": {"endpoint": {"url": "http://j/v1", "model": "m"}, "propositions": statements},
    }


@pytest.mark.parametrize(
    ("terms", "path", "words"),
    [
        pytest.param(
            [{"name": "bad", "expression": "words + __import__('os')"}],
            f"{AT}[0].expression",
            ("position 9: got a call of `__import__`", "use the functions min"),
            id="an expression that tries to import",
        ),
        pytest.param(
            [{"name": "bad", "expression": "1", "atLeast": 1, "atMost": 0}],
            f"{AT}[0]",
            ("above `atMost`",),
            id="limits",
        ),
        pytest.param(
            [{"name": "bad", "length": {"atLeast": 9, "atMost": 8}}],
            f"{AT}[0].length",
            ("above `atMost`",),
            id="length",
        ),
        pytest.param(
            [feedback_term(worst=10, best=0)], f"{AT}[0].feedback", ("`worst` must be below",), id="marks upside down"
        ),
        pytest.param(
            [feedback_term(instruction="Mark {prompt}.")],
            f"{AT}[0].feedback.instruction",
            ("must hold `{answer}`",),
            id="a judge that does not see the answer",
        ),
        pytest.param(
            [{"name": "a", "expression": "1"}, {"name": "a", "expression": "2"}],
            f"{AT}[1].name",
            ("must be unique",),
            id="two terms of one name",
        ),
        pytest.param(
            [judged("kind", "kind")],
            f"{AT}[0].propositions.propositions[1].name",
            ("must be unique",),
            id="two statements of one name",
        ),
    ],
)
def test_each_fault_is_told_with_its_place(terms: list[dict[str, Any]], path: str, words: tuple[str, ...]) -> None:
    (problem,) = problems_of(evaluate_stage(*terms))
    assert problem.path == path
    assert all(word in str(problem) for word in words)


def test_rivals_of_one_name_are_told() -> None:
    rival = {"name": "before", "model": {"uri": "rival"}}
    (problem,) = problems_of(evaluate_stage({"name": "a", "expression": "1"}, rivals=[rival, rival]))
    assert problem.path == "spec.stages[0].evaluate.rewards[0].rivals[1].name"


def test_a_gate_may_watch_a_reward() -> None:
    stage = evaluate_stage({"name": "a", "expression": "1"})
    stage["evaluate"]["gates"] = [{"metric": "help.winRate.before", "atLeast": 0.5}]
    assert problems_of(stage) == ()
