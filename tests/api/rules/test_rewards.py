"""Rules over rewards, and how their violations are reported."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api.problems import InvalidRun, Problem
from stagecoach_api.reading.validation import validate
from tests.trainer.rewards.makers import evaluate_stage, feedback_term

KEY = {"secret": "judge-key"}
AT = "stages.compare.evaluate.rewards[0].rewards"


def problems_of(*stages: dict[str, Any]) -> tuple[Problem, ...]:
    spec = {"storage": {"uri": "s3://models/demo"}, "stages": list(stages)}
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


def test_valid_rewards_are_accepted() -> None:
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
            ("must contain `{answer}`",),
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
def test_each_fault_is_reported_with_its_path(terms: list[dict[str, Any]], path: str, words: tuple[str, ...]) -> None:
    (problem,) = problems_of(evaluate_stage(*terms))
    assert problem.path == path
    assert all(word in str(problem) for word in words)


def test_rivals_of_one_name_are_reported() -> None:
    rival = {"name": "before", "model": {"uri": "rival"}}
    (problem,) = problems_of(evaluate_stage({"name": "a", "expression": "1"}, rivals=[rival, rival]))
    assert problem.path == "stages.compare.evaluate.rewards[0].rivals[1].name"


def test_a_gate_may_watch_a_reward() -> None:
    stage = evaluate_stage({"name": "a", "expression": "1"})
    stage["evaluate"]["gates"] = [{"metric": "help.winRate.before", "atLeast": 0.5}]
    assert problems_of(stage) == ()


# -- domains of prompts ------------------------------------------------------------------------------------------------


def run_of(domain: str | None, *terms: dict[str, Any], domains: tuple[str, ...] = ("zh", "en")) -> list[dict[str, Any]]:
    """A reward model, PPO by it on prompts of a domain, and a comparison on such prompts."""
    training = {"batch": {"samples": 8}, "optimizer": {"learningRate": 1e-5}, "sequenceLength": 256}
    reward = {"model": {"uri": "base"}, "data": [{"uri": "pairs.json"}], **training}
    reward["domains"] = [{"name": name, "system": "s"} for name in domains]
    ppo = {
        "model": {"uri": "base"},
        "data": [{"name": "first", "uri": "p.json"}, {"uri": "p.json"} | ({"domain": domain} if domain else {})],
        "rewards": list(terms),
        **training,
    }
    on = {"name": "prompts", "uri": "prompts"} | ({"domain": domain} if domain else {})
    return [
        {"name": "reward", "rewardModel": reward},
        {"name": "ppo", "ppo": ppo},
        evaluate_stage(*terms, data=on, rivals=[]),
    ]


JUDGE = {"name": "judge", "model": {"stage": "reward"}}
FORMULA = {"name": "formula", "expression": "1"}
DOMAIN_FIELDS = ["stages.ppo.ppo.data[1].domain", "stages.compare.evaluate.rewards[0].data.domain"]


@pytest.mark.parametrize(
    ("domain", "terms", "domains"),
    [
        pytest.param("zh", (JUDGE, FORMULA), ("zh", "en"), id="known"),
        pytest.param(None, (JUDGE,), ("zh",), id="none"),
        pytest.param("zh", ({"name": "far", "model": {"uri": "far"}},), (), id="a model at a URI is looked at later"),
        pytest.param("zh", (JUDGE, {"name": "far", "model": {"uri": "far"}}), (), id="one of them at a URI"),
    ],
)
def test_valid_domains_are_accepted(
    domain: str | None, terms: tuple[dict[str, Any], ...], domains: tuple[str, ...]
) -> None:
    assert problems_of(*run_of(domain, *terms, domains=domains)) == ()


@pytest.mark.parametrize(
    ("domain", "terms", "domains", "words"),
    [
        pytest.param(
            "zn",
            (JUDGE, FORMULA),
            ("zh", "en"),
            ("`domains` of the stage `reward`", "use one of: zh, en"),
            id="unknown",
        ),
        pytest.param("zh", (JUDGE,), (), ("no reward model among the terms has domains",), id="no domains"),
        pytest.param("zh", (FORMULA,), ("zh",), ("no reward model among the terms has domains",), id="no reward model"),
    ],
)
def test_domains_that_no_reward_model_has_are_reported(
    domain: str, terms: tuple[dict[str, Any], ...], domains: tuple[str, ...], words: tuple[str, ...]
) -> None:
    found = problems_of(*run_of(domain, *terms, domains=domains))
    assert [problem.path for problem in found] == DOMAIN_FIELDS
    assert [word for word in words if not all(word in str(problem) for problem in found)] == []
