"""Which pod explains an attempt's end, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_operator.termination import SETTLE_SECONDS, verdict_of, word_of
from stagecoach_operator.watched import ContainerEnd, PodView
from tests.operator.view_makers import NOW, jobset, pod

CONTENT = "c" * 64


def ended(index: int = 0, code: int = 0, at: float = NOW - 10, reason: str = "", **result: Any) -> PodView:
    """A pod whose launcher left a result."""
    told = json.dumps({"exitCode": code, **result})
    phase = "Failed" if code else "Succeeded"
    return replace(pod(index), phase=phase, end=ContainerEnd(code % 256, reason, told, at))


def silent(index: int = 0, code: int = 137, at: float = NOW - 10, reason: str = "", text: str = "") -> PodView:
    """A pod whose launcher left nothing."""
    return replace(pod(index), phase="Failed", end=ContainerEnd(code, reason, text, at))


def test_pod_0s_result_is_the_attempts() -> None:
    word = verdict_of([ended(contentDigest=CONTENT), pod(1)], jobset(2), NOW).word
    assert word is not None
    assert (word.cause, word.content_digest) == (None, CONTENT)


def test_another_pods_success_says_nothing() -> None:
    assert verdict_of([pod(0), ended(1)], jobset(2), NOW).word is None


@pytest.mark.parametrize(
    ("pods", "cause", "says"),
    [
        pytest.param(
            [ended(0, 1, cause="infrastructure", message="peer closed"), silent(1, reason="OOMKilled")],
            Cause.INFRASTRUCTURE,
            "OOMKilled",
            id="a pod that ran out of memory explains its sibling's broken connection",
        ),
        pytest.param(
            [
                ended(0, 1, at=NOW - 20, cause="infrastructure", message="peer closed"),
                ended(1, 64, cause="user", message="no such field"),
            ],
            Cause.USER,
            "no such field",
            id="an error with a name goes before one without, though it came later",
        ),
        pytest.param(
            [
                ended(0, 66, at=NOW - 5, cause="user", message="later"),
                ended(1, 66, at=NOW - 6, cause="user", message="first"),
            ],
            Cause.USER,
            "first",
            id="of two names the first counts",
        ),
        pytest.param(
            [
                replace(silent(0, 137), disruption="PreemptionByScheduler", disruption_message="for another pod"),
                ended(1, 75, cause="preemption"),
            ],
            Cause.PREEMPTION,
            "PreemptionByScheduler",
            id="who is preempted is not charged, even when there was no time to say so",
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
            id="an error of the user's stays one while the node is drained",
        ),
        pytest.param(
            [replace(pod(0), phase="Failed", reason="Evicted", message="the node was low on memory")],
            Cause.INFRASTRUCTURE,
            "low on memory",
            id="an evicted pod without a container state still says why",
        ),
        pytest.param(
            [silent(0, 1, text="Traceback …\nValueError: x")],
            Cause.INFRASTRUCTURE,
            "ValueError: x",
            id="where there is no result, the last lines of the log are told",
        ),
    ],
)
def test_the_pod_that_knows_why_is_believed(pods: list[PodView], cause: Cause, says: str) -> None:
    word = verdict_of(pods, jobset(len(pods)), NOW).word
    assert word is not None
    assert word.cause is cause
    assert says in word.message


def test_siblings_are_waited_for_before_a_nameless_end_is_believed() -> None:
    early = ended(0, 1, at=NOW - 0.5, cause="infrastructure", message="peer closed")
    verdict = verdict_of([early, pod(1)], jobset(2), NOW)
    assert verdict.word is None
    assert verdict.look_again_at == NOW - 0.5 + SETTLE_SECONDS
    assert verdict_of([early, pod(1)], jobset(2), NOW + 2).word is not None
    assert verdict_of([early, ended(1, 1, cause="infrastructure")], jobset(2), NOW).word is not None, "all have ended"


def test_what_pods_saved_is_heard_while_their_jobset_is_deleted() -> None:
    deleting = replace(jobset(2), meta=replace(jobset(2).meta, deleting=True))
    pods = [
        ended(1, 75, at=NOW, cause="preemption", lastStep=20),
        ended(0, 75, at=NOW, cause="preemption", lastStep=30),
    ]
    word = verdict_of(pods, deleting, NOW).word
    assert word is not None
    assert (word.cause, word.last_step) == (Cause.PREEMPTION, 30)


def test_a_queue_that_takes_an_attempt_back_does_not_end_it() -> None:
    deleted = ended(0, 75, cause="preemption")
    deleted = replace(deleted, meta=replace(deleted.meta, deleting=True))
    assert verdict_of([deleted], replace(jobset(), suspended=True), NOW).word is None
    assert verdict_of([deleted], jobset(), deleted.end.finished).word is None, "its JobSet may be about to say so"  # type: ignore[union-attr]


@pytest.mark.parametrize("hint", ["completed", "failed"])
def test_without_pods_the_jobset_is_believed(hint: str) -> None:
    said = {"completed": True} if hint == "completed" else {"failed": "BackoffLimitExceeded", "failed_at": NOW - 5}
    word = verdict_of([], replace(jobset(), **said), NOW).word  # type: ignore[arg-type]
    assert word is not None
    assert word.cause is (None if hint == "completed" else Cause.INFRASTRUCTURE)


def test_what_a_strange_image_writes_does_no_harm() -> None:
    word = word_of(ended(0, 0, contentDigest="no digest", lastStep=-5))
    assert (word.content_digest, word.last_step) == (None, None)
    assert word_of(ended(0, 100_000, cause="user")).exit_code == 256


def test_a_word_names_pod_and_node_and_is_short() -> None:
    word = word_of(ended(0, 64, cause="user", message="x" * 2400))
    assert (word.pod, word.node) == ("a-0", "node-0")
    assert len(word.message) <= 1024
