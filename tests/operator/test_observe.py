"""Observed attempts from watched objects and records."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_api.status import AttemptStatus, Reason
from stagecoach_core.values import AttemptState, WaitKind
from stagecoach_operator.attempt_times import moment
from stagecoach_operator.object_cache import Children
from stagecoach_operator.object_views import ContainerEnd, JobSetView, PodView
from stagecoach_operator.observe import ObservedAttempt, Signals, observe
from stagecoach_operator.pod_startup import stuck_pods
from stagecoach_operator.progress_reports import LatestReport, ProgressReport
from stagecoach_operator.termination import SETTLE_SECONDS
from tests.operator.view_makers import DIGEST, NOW, RUN, jobset, meta, pending, pod, workload


def record(**fields: Any) -> AttemptStatus:
    return AttemptStatus(**{"number": 1, "digest": DIGEST, "name": "a-1", "started": moment(NOW - 100), **fields})


def see(
    jobsets: tuple[JobSetView, ...] = (),
    pods: tuple[PodView, ...] = (),
    records: tuple[AttemptStatus, ...] = (),
    now: float = NOW,
    **signals: Any,
) -> ObservedAttempt:
    """Return the only attempt."""
    workloads = signals.pop("workloads", {})
    children = Children(jobsets, pods, workloads)
    known = {("a", item.number): item for item in records}
    (attempt,) = observe(RUN, known, children, Signals(**signals), now).values()
    return attempt


def test_an_unrecorded_attempt_is_observed() -> None:
    attempt = see((jobset(),), (pod(),))
    assert (attempt.state, attempt.record.number, attempt.record.digest) == (AttemptState.RUNNING, 1, DIGEST)
    assert attempt.record.running_since == moment(NOW), "by our clock, not by the node's"
    assert [item.pod for item in attempt.record.incarnations] == ["a-0"]


def test_a_jobset_that_another_object_owns_is_not_ours() -> None:
    assert observe(RUN, {}, Children((jobset(owner_uid="other"),)), Signals(), NOW) == {}


def test_an_attempt_whose_jobset_is_gone_has_ended() -> None:
    attempt = see(records=(record(),))
    assert (attempt.state, attempt.record.cause) == (AttemptState.ENDED, Cause.INFRASTRUCTURE)
    assert attempt.record.ended == moment(NOW)
    requested = see(records=(record(stopping="the run is suspended", stop_cause=Cause.PREEMPTION),))
    assert requested.record.cause is Cause.PREEMPTION
    assert "suspended" in requested.record.message
    reported = see(records=(record(cause=Cause.USER, exit_code=64, message="no such field"),))
    assert (reported.record.cause, reported.record.message) == (Cause.USER, "no such field")


def test_a_failed_attempt_is_deleted_and_keeps_its_first_explanation() -> None:
    failed = replace(pod(), phase="Failed", end=ContainerEnd(64, "", '{"exitCode": 64, "cause": "user"}', NOW - 9))
    attempt = see((jobset(),), (failed,))
    assert (attempt.state, attempt.record.cause, attempt.record.exit_code) == (AttemptState.STOPPING, Cause.USER, 64)
    assert attempt.deletion_reason
    later = replace(pod(), phase="Failed", end=ContainerEnd(1, "", "", NOW))
    assert see((jobset(),), (later,), (attempt.record,)).record.cause is Cause.USER
    deleting = jobset(meta=meta("a-1", deleting=True))
    assert see((deleting,), (failed,), (attempt.record,)).deletion_reason == "", "it is already being deleted"


def test_the_warnings_of_pod_0_are_kept_whichever_pod_explains_the_end() -> None:
    warnings = ("3 records have a field `weight`, which is not read",)
    first = json.dumps({"exitCode": 1, "cause": "infrastructure", "message": "peer closed", "warnings": warnings})
    second = '{"exitCode": 64, "cause": "user", "message": "no such field"}'
    pods = (
        replace(pod(0), phase="Failed", end=ContainerEnd(1, "", first, NOW - 9)),
        replace(pod(1), phase="Failed", end=ContainerEnd(64, "", second, NOW - 8)),
    )
    seen = see((jobset(2),), pods).record
    assert (seen.message, seen.warnings) == ("no such field", warnings)
    assert see((jobset(2),), (), (seen,)).record.warnings == warnings


def test_warnings_of_a_custom_image_are_brought_into_range() -> None:
    end = ContainerEnd(0, "", json.dumps({"exitCode": 0, "warnings": ["w" * 900] * 20}), NOW)
    record = see((jobset(),), (replace(pod(), phase="Succeeded", end=end),)).record
    assert AttemptStatus.model_validate(record.model_dump()).warnings[-1].startswith("and 13 more warnings")


def test_a_result_counts_even_after_a_stop_request() -> None:
    content = "c" * 64
    done = replace(
        pod(), phase="Succeeded", end=ContainerEnd(0, "", f'{{"exitCode": 0, "contentDigest": "{content}"}}', NOW)
    )
    attempt = see((jobset(),), (done,), (record(stopping="suspended", stop_cause=Cause.PREEMPTION),))
    assert (attempt.state, attempt.record.cause, attempt.record.content_digest) == (AttemptState.ENDED, None, content)


def test_an_attempt_runs_once_all_its_pods_run() -> None:
    attempt = see((jobset(2),), (pod(0), pending(1)))
    assert attempt.state is AttemptState.STARTING
    assert attempt.waiting is not None
    assert attempt.waiting.message == "1 of 2 pods run"


@pytest.mark.parametrize(
    ("pods", "warnings", "reason", "text"),
    [
        pytest.param(
            (pending(unschedulable="0/4 nodes are available"),), {}, Reason.UNSCHEDULABLE, "0/4 nodes", id="no node"
        ),
        pytest.param(
            (pending(waiting_reason="ErrImagePull", waiting_message="not found"),),
            {},
            Reason.IMAGE_UNAVAILABLE,
            "ErrImagePull: not found",
            id="no image",
        ),
        pytest.param(
            (pending(waiting_reason="CreateContainerConfigError", waiting_message='secret "s" not found'),),
            {},
            Reason.SECRET_MISSING,
            'secret "s" not found',
            id="no secret for a variable",
        ),
        pytest.param(
            (pending(waiting_reason="ContainerCreating"),),
            {"uid-a-0": 'FailedMount: MountVolume.SetUp failed: secret "s3" not found'},
            Reason.SECRET_MISSING,
            'secret "s3" not found',
            id="no secret for a volume, which only events report",
        ),
        pytest.param((), {"uid-a-1": "FailedCreate: exceeded quota"}, Reason.CREATION_REFUSED, "quota", id="no pods"),
    ],
)
def test_the_reason_for_waiting_is_reported(
    pods: tuple[PodView, ...], warnings: dict[str, str], reason: Reason, text: str
) -> None:
    fresh = tuple(replace(item, meta=replace(item.meta, created=NOW - 3)) for item in pods)
    attempt = see((jobset(),), fresh, warnings=warnings)
    assert attempt.waiting is not None
    assert attempt.waiting.reason is reason
    assert text in attempt.waiting.message
    assert attempt.deletion_reason == ""


def test_a_wait_is_one_while_its_reason_alternates() -> None:
    backing_off = pending(waiting_reason="ImagePullBackOff", waiting_message="no")
    first = see((jobset(),), (backing_off,))
    pulling = see((jobset(),), (pending(waiting_reason="ContainerCreating"),), (first.record,), now=NOW + 20)
    again = see((jobset(),), (backing_off,), (pulling.record,), now=NOW + 40).as_core_attempt(NOW + 40)
    assert again.wait is not None
    assert (again.wait.kind, again.wait.since, again.wait.reason) == (WaitKind.IMAGE, NOW, "ImageUnavailable")


def test_kueues_message_is_reported_unchanged() -> None:
    waiting = see((jobset(queue="research", suspended=True),), workloads={"uid-a-1": workload()}).waiting
    assert waiting is not None
    assert (waiting.reason, waiting.message) == (Reason.WAITING_FOR_QUOTA, workload().message)
    evicted = workload(evicted="Preempted", message="Preempted to accommodate a workload")
    again = see((jobset(queue="research", suspended=True),), workloads={"uid-a-1": evicted}).waiting
    assert again is not None
    assert again.reason is Reason.PREEMPTED


def test_incarnations_are_distinguished_by_pod_uid() -> None:
    first = see((jobset(),), (pod(),)).record
    second = pod(meta=meta("a-0-x", uid="uid-second"), running_since=NOW - 1)
    attempt = see((jobset(),), (second,), (first,))
    assert [item.pod_uid for item in attempt.record.incarnations] == ["uid-a-0", "uid-second"]


def test_silence_counts_from_the_newest_pod_after_a_first_report() -> None:
    silent = see((jobset(),), (pod(),))
    assert silent.as_core_attempt(NOW).heartbeat == NOW
    reports = {("a", 1): LatestReport(ProgressReport(pod_uid="uid-a-0", time=NOW - 7200), longest_silence=5.0)}
    resumed = see((jobset(),), (pod(running_since=NOW - 2),), reports=reports)
    assert resumed.as_core_attempt(NOW).heartbeat == NOW


def test_the_time_of_the_next_observation_is_returned() -> None:
    early = replace(pod(0), phase="Failed", end=ContainerEnd(1, "", "", NOW - 1))
    settling = see((jobset(2),), (early, pod(1)))
    assert (settling.settling, settling.look_again_at) == (True, NOW + SETTLE_SECONDS)
    later = see((jobset(2),), (early, pod(1)), now=NOW + SETTLE_SECONDS, settling={("a", 1): NOW})
    assert (later.settling, later.record.exit_code) == (False, 1)


def test_a_pod_that_stays_in_container_creation_is_stuck() -> None:
    creating = pending(waiting_reason="ContainerCreating", meta=meta("a-0", created=NOW - 3))
    assert stuck_pods([creating], NOW - 3, NOW) == []
    assert stuck_pods([creating], NOW - 3, NOW + 2) == [creating]
