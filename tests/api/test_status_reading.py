"""Statuses that another version has written."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_api.status_reading import read_status, with_unknown

DIGEST = "d" * 64
TIME = "2027-01-15T08:00:00Z"


def attempt(**fields: Any) -> dict[str, Any]:
    return {"number": 1, "digest": DIGEST, "name": "r", "started": TIME, **fields}


def of_stage(**fields: Any) -> dict[str, Any]:
    return {"stages": [{"name": "a", "state": "Succeeded", **fields}]}


CONDITION = {"type": "Complete", "status": "True", "reason": "AllStagesFinished", "lastTransitionTime": TIME}


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param({"weather": {"rain": 1}}, id="a field"),
        pytest.param(of_stage(humidity=3), id="a field of a stage"),
        pytest.param(of_stage(attempts=[attempt(ended=TIME, pressure=[1])]), id="a field of an attempt"),
        pytest.param(of_stage(attempts=[attempt(ended=TIME, cause="eviction")]), id="a cause"),
        pytest.param(of_stage(attempts=[attempt(ended=TIME, stopCause="quota", cause="user")]), id="a cause of a stop"),
        pytest.param(of_stage(forgotten={"digest": DIGEST, "until": TIME, "eviction": 3}), id="a count"),
        pytest.param({"conditions": [{**CONDITION, "type": "Stalled"}]}, id="a condition"),
        pytest.param({"summary": {"state": "Progressing", "goodput": 97}}, id="a field of the summary"),
    ],
)
def test_what_a_newer_version_wrote_is_written_back_unchanged(raw: dict[str, Any]) -> None:
    reading = read_status(raw)
    assert reading.unreadable == ""
    written = with_unknown(raw, reading.status.model_dump(mode="json", exclude_none=True))
    assert contains(written, raw)


def contains(found: Any, expected: Any) -> bool:
    """Whether a JSON value has all that another has, and more at most."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and contains(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return isinstance(found, list) and all(contains(*pair) for pair in zip(found, expected, strict=True))
    return bool(found == expected)


def test_an_attempt_that_failed_for_an_unknown_cause_has_failed() -> None:
    (stage,) = read_status(of_stage(attempts=[attempt(ended=TIME, cause="eviction")])).status.stages
    assert stage.attempts[0].cause is Cause.INFRASTRUCTURE


def test_odd_values_that_nothing_depends_on_are_left_out_and_the_rest_is_kept() -> None:
    raw = of_stage(state="Paused", progress=7, gpuSeconds=-1, attempts=[attempt(message=3, incarnations="?")])
    raw |= {"conditions": [{**CONDITION, "reason": "New"}, 5, CONDITION], "summary": [], "observedGeneration": "x"}
    reading = read_status(raw)
    assert reading.unreadable == ""
    assert [item.reason.value for item in reading.status.conditions] == ["AllStagesFinished"]
    assert [(stage.name, stage.state.value, len(stage.attempts)) for stage in reading.status.stages] == [
        ("a", "Pending", 1)
    ]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param([], id="no object"),
        pytest.param({"stages": "?"}, id="no list"),
        pytest.param({"planDigest": "sha512:0"}, id="a digest of the plan"),
        pytest.param(of_stage(artifact={"uri": "s3://b/a"}), id="an incomplete artifact"),
        pytest.param(of_stage(attempts=[attempt(stopCause="quota")]), id="a cause of a living attempt"),
        pytest.param(of_stage(attempts=[attempt(), attempt()]), id="a number twice"),
        pytest.param(of_stage(attempts=[attempt(number=10**9)]), id="numbers used up"),
        pytest.param({"stages": [*of_stage()["stages"] * 2]}, id="a stage twice"),
    ],
)
def test_what_a_decision_depends_on_is_never_read_as_nothing(raw: Any) -> None:
    assert read_status(raw).unreadable.startswith("status")
