"""A cluster's run: the rows of its table, and its warnings."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_api.status import ConditionType, Reason, StageState
from stagecoach_cli.cluster.api import ClusterError
from stagecoach_cli.cluster.runs import ClusterRun, cluster_run, digests_in_use, snapshot_of, warnings_of
from stagecoach_cli.display.rows import describe
from stagecoach_core.values import RunState
from tests.cli.cluster.makers import FakeCluster, condition, failed_status, stage_status, status_of, suspended_status

NOW = 1_795_341_600.0
DIGEST, OTHER = "a" * 64, "b" * 64
WAITS = "couldn't assign flavors to pod set w: insufficient quota for cpu in flavor default"


def attempt(number: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "number": number,
        "digest": DIGEST,
        "name": f"r-demo-sft-{number}",
        "started": "2026-11-22T10:00:00Z",
        **fields,
    }


def run_of(*stages: Any, **fields: Any) -> ClusterRun:
    return cluster_run(FakeCluster().add_run(*stages, **fields))


def test_a_stage_is_shown_with_everything_in_its_status() -> None:
    working = stage_status(
        state=StageState.RUNNING,
        attempt=3,
        digest=DIGEST,
        progress={"activity": "train", "done": 1200, "total": 4000, "unit": "tokens", "eta": "2026-11-22T10:05:00Z"},
        restarts={"infrastructure": 1, "preemption": 1},
        attempts=[attempt(3)],
    )
    spec = {
        "defaults": {"resources": {"nodes": 2}},
        "stages": [{"name": "sft", "sft": {}, "resources": {"gpusPerNode": 8}}],
    }
    snapshot = snapshot_of(run_of(working, spec=spec), NOW)
    (row,) = snapshot.rows
    assert (row.kind, row.ranks, row.view.state, row.view.attempt) == ("sft", 16, StageState.RUNNING, 3)
    assert row.view.restarts == {Cause.INFRASTRUCTURE: 1, Cause.PREEMPTION: 1}
    assert describe(row, NOW) == ("train 1.2k/4k tokens  5 m 00 s left  restarted: infrastructure × 1, preemption × 1")


def test_finished_stages_have_their_time_and_show_the_storage() -> None:
    artifact = {"uri": f"s3://kept/here/artifacts/{DIGEST}/output", "stageDigest": DIGEST, "contentDigest": OTHER}
    times = {"started": "2026-11-22T10:00:00Z", "finished": "2026-11-22T10:01:15Z"}
    done = stage_status(state=StageState.SUCCEEDED, digest=DIGEST, artifact=artifact, **times)
    cached = stage_status("data", StageState.CACHED, digest=OTHER, cached=True)
    snapshot = snapshot_of(run_of(done, cached, spec={"stages": []}), NOW)
    assert [describe(row, NOW) for row in snapshot.rows] == ["1 m 15 s  aaaaaaaaaaaa", "cached  bbbbbbbbbbbb"]
    assert snapshot.storage == "s3://kept/here"


def test_a_run_that_no_operator_has_seen_shows_the_stages_of_its_spec() -> None:
    body = FakeCluster().add_run()
    body["status"] = {}
    run = cluster_run(body)
    assert [(row.name, row.view.waiting_for) for row in snapshot_of(run, NOW).rows] == [("sft", "the operator")]
    assert warnings_of(run) == ["no operator has seen the run yet; check that an operator watches this namespace"]


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        pytest.param((), [], id="a healthy run"),
        pytest.param(
            (condition(ConditionType.QUOTA_RESERVED, False, Reason.WAITING_FOR_QUOTA, f"stage `sft`: {WAITS}"),),
            [f"QuotaReserved is False, WaitingForQuota: stage `sft`: {WAITS}"],
            id="a queue's message",
        ),
        pytest.param(
            (condition(ConditionType.PROGRESSING, True, Reason.UNSCHEDULABLE, "stage `sft`: 0/4 nodes are available"),),
            ["Progressing is True, Unschedulable: stage `sft`: 0/4 nodes are available"],
            id="pods that fit nowhere",
        ),
        pytest.param(
            (condition(ConditionType.PROGRESSING, False, Reason.JOBSET_NOT_INSTALLED, "install JobSet"),),
            ["Progressing is False, JobSetNotInstalled: install JobSet"],
            id="a missing prerequisite",
        ),
        pytest.param(
            (
                condition(ConditionType.ACCEPTED, False, Reason.INVALID_SPEC, "spec.stages[0]: cycle"),
                condition(ConditionType.PROGRESSING, False, Reason.INVALID_SPEC, "the run is not accepted"),
            ),
            ["Accepted is False, InvalidSpec: spec.stages[0]: cycle"],
            id="a rejection is shown once",
        ),
        pytest.param(
            (condition(ConditionType.SUSPENDED, False, Reason.STOPPING_STAGES, "`sft` end at a checkpoint"),),
            ["Suspended is False, StoppingStages: `sft` end at a checkpoint"],
            id="a run that is being suspended",
        ),
    ],
)
def test_conditions_that_need_attention_are_shown_unchanged(given: Any, lines: list[str]) -> None:
    assert warnings_of(run_of(status=status_of(stage_status(), conditions=given))) == lines


def test_conditions_of_an_older_spec_are_ignored() -> None:
    old = run_of(status=suspended_status(1, stage_status()), generation=2)
    assert not old.is_true(ConditionType.SUSPENDED)
    assert "the operator has not seen the newest edit yet" in warnings_of(old)
    assert run_of(status=suspended_status(2), generation=2).is_true(ConditionType.SUSPENDED)


def test_a_run_that_is_being_deleted_has_a_warning() -> None:
    run = run_of(stage_status(), generation=2, deletionTimestamp="2026-11-22T10:00:00Z")
    assert warnings_of(run) == ["the run is being deleted: it is removed when its pods have ended"]


def test_a_cancelled_run_is_over_and_no_other_failure_is_a_cancellation() -> None:
    cancelled = run_of(status=failed_status(1, Reason.CANCELLED, "cancelled"))
    failed = run_of(status=failed_status(1))
    assert (cancelled.is_over, cancelled.is_cancelled, cancelled.state) == (True, True, RunState.CANCELLED)
    assert (failed.is_over, failed.is_cancelled) == (True, False)


def test_attempts_are_sorted_by_start_and_select_their_pods_by_label() -> None:
    first = stage_status(
        "a", attempts=[attempt(1, ended="2026-11-22T10:00:09Z"), attempt(2, started="2026-11-22T10:00:10Z")]
    )
    second = stage_status("b", attempts=[attempt(1, started="2026-11-22T10:00:05Z")])
    run = run_of(first, second)
    assert [(item.stage, item.number, item.ended) for item in run.attempts()] == [
        ("a", 1, True),
        ("b", 1, False),
        ("a", 2, False),
    ]
    assert run.selector(run.attempts()[1]) == (
        "stagecoach.dev/run-uid=uid-of-demo,stagecoach.dev/stage=b,stagecoach.dev/attempt=1"
    )


def test_digests_in_use_are_those_of_stages_live_attempts_and_inputs() -> None:
    ended = attempt(1, digest="c" * 64, ended="2026-11-22T10:00:09Z")
    stage = stage_status(digest=DIGEST, attempts=[ended, attempt(2, digest="d" * 64)])
    spec = {"stages": [{"name": "sft", "sft": {"model": {"uri": f"s3://models/x/artifacts/{'e' * 64}/output"}}}]}
    assert digests_in_use(FakeCluster().add_run(stage, spec=spec)) == {DIGEST, "d" * 64, "e" * 64}


def test_a_status_of_another_version_is_reported_with_what_to_do() -> None:
    body = FakeCluster().add_run(stage_status())
    body["status"]["stages"][0]["attempts"] = "many"
    with pytest.raises(
        ClusterError, match=r"status\.stages\.0\.attempts.*install the same version of `stagecoach` as the operator's"
    ):
        cluster_run(body)
