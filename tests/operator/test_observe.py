"""From watched objects and records to what the core decides on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_api.status import AttemptStatus, Reason
from stagecoach_core.values import AttemptState
from stagecoach_operator.observe import Sight, Surroundings, moment, observe
from stagecoach_operator.progress_reports import Heard, Report
from stagecoach_operator.termination import SETTLE_SECONDS
from stagecoach_operator.waiting import IMAGE_PATIENCE_SECONDS, stuck_pods
from stagecoach_operator.watched import Children, ContainerEnd, JobSetView, PodView
from tests.operator.view_makers import DIGEST, NOW, RUN, jobset, meta, pending, pod, workload


def record(**fields: Any) -> AttemptStatus:
    return AttemptStatus(**{"number": 1, "digest": DIGEST, "name": "a-1", "started": moment(NOW - 100), **fields})


def see(
    jobsets: tuple[JobSetView, ...] = (),
    pods: tuple[PodView, ...] = (),
    records: tuple[AttemptStatus, ...] = (),
    now: float = NOW,
    **surroundings: Any,
) -> Sight:
    """Return the one attempt there is."""
    workloads = surroundings.pop("workloads", {})
    children = Children(jobsets, pods, workloads)
    known = {("a", item.number): item for item in records}
    (sight,) = observe(RUN, known, children, Surroundings(**surroundings), now).values()
    return sight


def test_an_attempt_that_was_made_but_not_written_down_is_seen() -> None:
    sight = see((jobset(),), (pod(),))
    assert (sight.state, sight.record.number, sight.record.digest) == (AttemptState.RUNNING, 1, DIGEST)
    assert sight.record.running_since == moment(NOW - 50)
    assert [item.pod for item in sight.record.incarnations] == ["a-0"]


def test_a_jobset_that_another_object_owns_is_not_ours() -> None:
    assert observe(RUN, {}, Children((jobset(owner_uid="other"),)), Surroundings(), NOW) == {}


def test_an_attempt_whose_jobset_is_gone_has_ended() -> None:
    sight = see(records=(record(),))
    assert (sight.state, sight.record.cause) == (AttemptState.ENDED, Cause.INFRASTRUCTURE)
    assert sight.record.ended == moment(NOW)
    asked = see(records=(record(stopping="the run is suspended", stop_cause=Cause.PREEMPTION),))
    assert asked.record.cause is Cause.PREEMPTION
    assert "suspended" in asked.record.message
    told = see(records=(record(cause=Cause.USER, exit_code=64, message="no such field"),))
    assert (told.record.cause, told.record.message) == (Cause.USER, "no such field")


def test_a_failure_dooms_what_is_left_and_its_first_explanation_stays() -> None:
    failed = replace(pod(), phase="Failed", end=ContainerEnd(64, "", '{"exitCode": 64, "cause": "user"}', NOW - 9))
    sight = see((jobset(),), (failed,))
    assert (sight.state, sight.record.cause, sight.record.exit_code) == (AttemptState.STOPPING, Cause.USER, 64)
    assert sight.doomed
    later = replace(pod(), phase="Failed", end=ContainerEnd(1, "", "", NOW))
    assert see((jobset(),), (later,), (sight.record,)).record.cause is Cause.USER
    deleting = jobset(meta=meta("a-1", deleting=True))
    assert see((deleting,), (failed,), (sight.record,)).doomed == "", "it is being deleted already"


def test_a_result_counts_even_when_it_was_asked_to_stop() -> None:
    content = "c" * 64
    done = replace(
        pod(), phase="Succeeded", end=ContainerEnd(0, "", f'{{"exitCode": 0, "contentDigest": "{content}"}}', NOW)
    )
    sight = see((jobset(),), (done,), (record(stopping="suspended", stop_cause=Cause.PREEMPTION),))
    assert (sight.state, sight.record.cause, sight.record.content_digest) == (AttemptState.ENDED, None, content)


def test_only_when_all_pods_run_does_the_attempt_run() -> None:
    sight = see((jobset(2),), (pod(0), pending(1)))
    assert sight.state is AttemptState.STARTING
    assert sight.waiting is not None
    assert sight.waiting.message == "1 of 2 pods run"


@pytest.mark.parametrize(
    ("pods", "troubles", "reason", "says"),
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
            id="no secret for a volume, which only events tell",
        ),
        pytest.param((), {"uid-a-1": "FailedCreate: exceeded quota"}, Reason.CREATION_REFUSED, "quota", id="no pods"),
    ],
)
def test_what_is_waited_for_is_named(
    pods: tuple[PodView, ...], troubles: dict[str, str], reason: Reason, says: str
) -> None:
    fresh = tuple(replace(item, meta=replace(item.meta, created=NOW - 3)) for item in pods)
    sight = see((jobset(),), fresh, troubles=troubles)
    assert sight.waiting is not None
    assert sight.waiting.reason is reason
    assert says in sight.waiting.message
    assert sight.doomed == ""


def test_an_image_that_never_comes_ends_the_attempt_uncharged() -> None:
    waiting = pending(waiting_reason="ImagePullBackOff", waiting_message="no")
    soon = waiting.meta.created + IMAGE_PATIENCE_SECONDS
    before = see((jobset(),), (waiting,), now=soon - 1)
    assert (before.doomed, before.look_again_at) == ("", soon)
    sight = see((jobset(),), (waiting,), now=soon)
    assert sight.doomed
    assert sight.record.stop_cause is Cause.PREEMPTION


def test_kueues_reason_is_told_word_for_word() -> None:
    waiting = see((jobset(queue="research", suspended=True),), workloads={"uid-a-1": workload()}).waiting
    assert waiting is not None
    assert (waiting.reason, waiting.message) == (Reason.WAITING_FOR_QUOTA, workload().message)
    evicted = workload(evicted="Preempted", message="Preempted to accommodate a workload")
    again = see((jobset(queue="research", suspended=True),), workloads={"uid-a-1": evicted}).waiting
    assert again is not None
    assert again.reason is Reason.PREEMPTED


def test_incarnations_are_told_apart_by_the_pods_uid() -> None:
    first = see((jobset(),), (pod(),)).record
    second = pod(meta=meta("a-0-x", uid="uid-second"), running_since=NOW - 1)
    sight = see((jobset(),), (second,), (first,))
    assert [item.pod_uid for item in sight.record.incarnations] == ["uid-a-0", "uid-second"]


def test_silence_counts_from_the_newest_pod_and_only_once_something_was_heard() -> None:
    unheard = see((jobset(),), (pod(),))
    assert unheard.as_attempt(NOW).heartbeat == NOW
    heard = {("a", 1): Heard(Report(pod_uid="uid-a-0", time=NOW - 7200), longest_silence=5.0)}
    resumed = see((jobset(),), (pod(running_since=NOW - 2),), heard=heard)
    assert resumed.as_attempt(NOW).heartbeat == NOW - 2


def test_the_moment_to_look_again_is_told() -> None:
    early = replace(pod(0), phase="Failed", end=ContainerEnd(1, "", "", NOW - 1))
    assert see((jobset(2),), (early, pod(1))).look_again_at == NOW - 1 + SETTLE_SECONDS


def test_a_pod_that_creates_its_containers_for_long_is_asked_about() -> None:
    creating = pending(waiting_reason="ContainerCreating", meta=meta("a-0", created=NOW - 3))
    assert stuck_pods([creating], NOW) == []
    assert stuck_pods([creating], NOW + 2) == [creating]
