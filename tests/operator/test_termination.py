"""Which pod explains an attempt's end, and what is reported about it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_operator.object_views import ContainerEnd, PodView
from stagecoach_operator.termination import SETTLE_SECONDS, outcome_of, termination_of
from tests.operator.view_makers import NOW, jobset, pod

CONTENT = "c" * 64


def ended(index: int = 0, code: int = 0, at: float = NOW - 10, reason: str = "", **result: Any) -> PodView:
    """A pod whose launcher wrote a result."""
    message = json.dumps({"exitCode": code, **result})
    phase = "Failed" if code else "Succeeded"
    return replace(pod(index), phase=phase, end=ContainerEnd(code % 256, reason, message, at))


def silent(index: int = 0, code: int = 137, at: float = NOW - 10, reason: str = "", text: str = "") -> PodView:
    """A pod whose launcher wrote nothing."""
    return replace(pod(index), phase="Failed", end=ContainerEnd(code, reason, text, at))


def test_the_result_of_pod_0_is_the_attempts() -> None:
    report = outcome_of([ended(contentDigest=CONTENT), pod(1)], jobset(2), NOW).report
    assert report is not None
    assert (report.result.cause, report.result.content_digest) == (None, CONTENT)


def test_the_success_of_another_pod_does_not_count() -> None:
    assert outcome_of([pod(0), ended(1)], jobset(2), NOW).report is None


@pytest.mark.parametrize(
    ("pods", "cause", "text"),
    [
        pytest.param(
            [ended(0, 1, cause="infrastructure", message="peer closed"), silent(1, reason="OOMKilled")],
            Cause.INFRASTRUCTURE,
            "OOMKilled",
            id="an OOM kill explains the other pod's broken connection",
        ),
        pytest.param(
            [
                ended(0, 1, at=NOW - 20, cause="infrastructure", message="peer closed"),
                ended(1, 64, cause="user", message="no such field"),
            ],
            Cause.USER,
            "no such field",
            id="a specific error takes precedence over an earlier unspecific one",
        ),
        pytest.param(
            [
                ended(0, 66, at=NOW - 5, cause="user", message="later"),
                ended(1, 66, at=NOW - 6, cause="user", message="first"),
            ],
            Cause.USER,
            "first",
            id="the first of two specific errors",
        ),
        pytest.param(
            [
                replace(silent(0, 137), disruption="PreemptionByScheduler", disruption_message="for another pod"),
                ended(1, 75, cause="preemption"),
            ],
            Cause.PREEMPTION,
            "PreemptionByScheduler",
            id="a preempted pod is not charged even if it was killed without a result",
        ),
        pytest.param(
            [replace(silent(0, 137), disruption="DeletionByTaintManager", disruption_message="node gone")],
            Cause.INFRASTRUCTURE,
            "exit code -9",
            id="a lost node is infrastructure",
        ),
        pytest.param(
            [replace(ended(0, 64, cause="user", message="bad"), disruption="EvictionByEvictionAPI")],
            Cause.USER,
            "bad",
            id="a user error on a drained node",
        ),
        pytest.param(
            [replace(pod(0), phase="Failed", reason="Evicted", message="the node was low on memory")],
            Cause.INFRASTRUCTURE,
            "low on memory",
            id="an evicted pod without a container state",
        ),
        pytest.param(
            [silent(0, 1, text="Traceback …\nValueError: x")],
            Cause.INFRASTRUCTURE,
            "ValueError: x",
            id="without a result, the last lines of the log",
        ),
    ],
)
def test_the_most_specific_report_explains_the_end(pods: list[PodView], cause: Cause, text: str) -> None:
    report = outcome_of(pods, jobset(len(pods)), NOW).report
    assert report is not None
    assert report.result.cause is cause
    assert text in report.result.message


def test_an_unspecific_end_waits_for_the_other_pods() -> None:
    early = ended(0, 1, at=NOW - 0.5, cause="infrastructure", message="peer closed")
    outcome = outcome_of([early, pod(1)], jobset(2), NOW)
    assert outcome.report is None
    assert outcome.look_again_at == NOW + SETTLE_SECONDS
    assert outcome_of([early, pod(1)], jobset(2), NOW + 1, NOW).look_again_at == NOW + SETTLE_SECONDS
    assert outcome_of([early, pod(1)], jobset(2), NOW + 2, NOW).report is not None
    assert outcome_of([early, ended(1, 1, cause="infrastructure")], jobset(2), NOW).report is not None, "all have ended"


def test_checkpoints_are_reported_while_the_jobset_is_deleted() -> None:
    deleting = replace(jobset(2), meta=replace(jobset(2).meta, deleting=True))
    pods = [
        ended(1, 75, at=NOW, cause="preemption", lastStep=20),
        ended(0, 75, at=NOW, cause="preemption", lastStep=30),
    ]
    report = outcome_of(pods, deleting, NOW).report
    assert report is not None
    assert (report.result.cause, report.result.last_step) == (Cause.PREEMPTION, 30)


def test_a_preemption_by_the_queue_does_not_end_the_attempt() -> None:
    deleted = ended(0, 75, cause="preemption")
    deleted = replace(deleted, meta=replace(deleted.meta, deleting=True))
    assert outcome_of([deleted], replace(jobset(), suspended=True), NOW).report is None
    assert outcome_of([deleted], jobset(), deleted.end.finished).report is None, "a suspension may follow"  # type: ignore[union-attr]


@pytest.mark.parametrize("hint", ["completed", "failed"])
def test_without_pods_the_jobset_decides(hint: str) -> None:
    status: dict[str, Any] = (
        {"completed": True} if hint == "completed" else {"failed": "BackoffLimitExceeded", "failed_at": NOW - 5}
    )
    report = outcome_of([], replace(jobset(), **status), NOW, NOW - SETTLE_SECONDS).report
    assert report is not None
    assert report.result.cause is (None if hint == "completed" else Cause.INFRASTRUCTURE)


def test_invalid_fields_of_a_custom_image_are_dropped() -> None:
    report = termination_of(ended(0, 0, contentDigest="not a digest", lastStep=-5))
    assert (report.result.content_digest, report.result.last_step) == (None, None)
    assert termination_of(ended(0, 100_000, cause="user")).result.exit_code == 256


def test_a_report_has_pod_and_node_and_a_bounded_message() -> None:
    report = termination_of(ended(0, 64, cause="user", message="x" * 2400))
    assert (report.pod, report.node) == ("a-0", "node-0")
    assert len(report.result.message) <= 1024
