"""Gates."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stagecoach_api.kinds.evaluate import EvaluateStage, Gate
from stagecoach_trainer.evaluation.gates import check_gates, metrics_to_come, require_known
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.rewards.makers import evaluate_stage

METRICS = {"heldOut.zh.bitsPerCharacter": 2.5, "verse.exactMatch": 0.75, "broken": math.nan, "endless": math.inf}


def gate(**values: Any) -> Gate:
    return Gate.model_validate(values)


@pytest.mark.parametrize(
    ("values", "passed"),
    [
        pytest.param({"metric": "verse.exactMatch", "atLeast": 0.75}, True, id="the limit itself is enough from below"),
        pytest.param({"metric": "verse.exactMatch", "atMost": 0.75}, True, id="and from above"),
        pytest.param({"metric": "verse.exactMatch", "atLeast": 0.76}, False, id="too low"),
        pytest.param({"metric": "heldOut.zh.bitsPerCharacter", "atMost": 2.4}, False, id="too high"),
        pytest.param({"metric": "heldOut.zh.bitsPerCharacter", "atLeast": 2, "atMost": 3}, True, id="between"),
        pytest.param({"metric": "heldOut.zh.bitsPerCharacter", "atLeast": 2.6, "atMost": 3}, False, id="below both"),
        pytest.param({"metric": "broken", "atLeast": -1e9}, False, id="NaN never passes from below"),
        pytest.param({"metric": "broken", "atMost": 1e9}, False, id="nor from above"),
        pytest.param({"metric": "endless", "atMost": 1e9}, False, id="infinity is too high"),
    ],
)
def test_a_metric_is_held_against_its_limits(values: dict[str, Any], passed: bool) -> None:
    (result,) = check_gates([gate(**values)], METRICS)
    assert result.passed is passed
    assert result.stops is not passed


def test_a_missed_gate_may_let_the_run_continue() -> None:
    (result,) = check_gates([gate(metric="verse.exactMatch", atLeast=0.9, onFailure="continue")], METRICS)
    assert not result.passed
    assert not result.stops


def test_a_missed_gate_names_metric_value_and_limit() -> None:
    (result,) = check_gates([gate(metric="verse.exactMatch", atLeast=0.9, atMost=1)], METRICS)
    assert result.sentence == "verse.exactMatch is 0.75, the gate requires ≥ 0.9 and ≤ 1"


def test_the_message_for_an_unknown_metric_names_the_nearest_and_all_others() -> None:
    gates = [gate(metric="verse.exactMatch", atLeast=0), gate(metric="verse.exactmatch", atLeast=0)]
    with pytest.raises(UserError) as caught:
        check_gates(gates, METRICS)
    message = str(caught.value)
    assert message.startswith("gates[1].metric: `verse.exactmatch` is not measured")
    assert "did you mean `verse.exactMatch`?" in message
    assert all(name in message for name in METRICS)


def test_with_nothing_measured_an_unknown_metric_is_still_an_error() -> None:
    with pytest.raises(UserError, match="It measures: none at all"):
        require_known([gate(metric="x", atLeast=0)], [])


def test_the_metrics_to_come_are_known_beforehand_unless_the_harness_names_them() -> None:
    values = {
        "model": {"uri": "m"},
        "heldOut": [{"name": "zh", "uri": "zh.txt"}],
        "exactMatch": [{"name": "verse", "data": {"name": "v", "uri": "v.json"}}],
        "rewards": evaluate_stage({"name": "a", "expression": "1"})["evaluate"]["rewards"],
    }
    assert metrics_to_come(EvaluateStage.model_validate(values)) == [
        "heldOut.zh.loss",
        "heldOut.zh.perplexity",
        "heldOut.zh.bitsPerCharacter",
        "heldOut.zh.perplexityPerCharacter",
        "heldOut.zh.tokensPerCharacter",
        "verse.exactMatch",
        "help.reward",
        "help.reward.before",
        "help.winRate.before",
    ]
    assert metrics_to_come(EvaluateStage.model_validate(values | {"lmEval": [{"task": "arc_easy"}]})) is None
