"""What is kept of watched objects: from real bodies to views, and a cache that only goes forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stagecoach_api import names
from stagecoach_operator.kube import (
    JOBSETS,
    PODS,
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    KubeError,
    NotFound,
    NotServed,
    TokenBucket,
    Unavailable,
    error_of,
)
from stagecoach_operator.watched import (
    Cache,
    Children,
    RunView,
    is_newer,
    jobset_view,
    pod_view,
    run_view,
    timestamp,
    workload_view,
)
from tests.operator.view_makers import NOW, RUN, jobset, meta, pod, workload

LABELS = {names.LABEL_RUN_UID: RUN, names.LABEL_STAGE: "a", names.LABEL_ATTEMPT: "3"}


def body(status: dict[str, Any] | None = None, spec: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    given = {"name": "x", "namespace": "team", "uid": "u", "resourceVersion": "7", **metadata}
    return {"metadata": given, "spec": spec or {}, "status": status or {}}


# -- views -------------------------------------------------------------------------------------------------------------


def test_a_pod_says_where_it_is() -> None:
    trainer = {"name": "trainer", "state": {"running": {"startedAt": "2027-01-15T08:00:00Z"}}}
    sidecar = {"name": "proxy", "state": {"waiting": {"reason": "ContainerCreating"}}}
    view = pod_view(
        body(
            {"phase": "Running", "containerStatuses": [sidecar, trainer]},
            {"nodeName": "n1"},
            labels={**LABELS, names.COMPLETION_INDEX: "12"},
        )
    )
    assert (view.run_uid, view.stage, view.number, view.index, view.node) == (RUN, "a", 3, 12, "n1")
    assert view.running_since == NOW


def test_trouble_goes_before_what_goes_on() -> None:
    init = {"name": "init", "state": {"waiting": {"reason": "PodInitializing"}}}
    trainer = {"name": "trainer", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
    view = pod_view(body({"phase": "Pending", "initContainerStatuses": [init], "containerStatuses": [trainer]}))
    assert (view.waiting_reason, view.waiting_message) == ("ErrImagePull", "no such image")


def test_the_scheduler_and_whoever_disturbs_are_quoted() -> None:
    conditions = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"},
        {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "by pod y"},
    ]
    view = pod_view(body({"phase": "Pending", "conditions": conditions}))
    assert (view.unschedulable, view.disruption) == ("0/3 nodes are available", "PreemptionByScheduler")
    gated = [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gated"}]
    assert pod_view(body({"conditions": gated})).unschedulable == ""


def test_a_jobset_knows_its_attempt_and_its_end() -> None:
    job = {"replicas": 1, "template": {"spec": {"parallelism": 16}}}
    owner = {"kind": names.KIND, "uid": RUN, "controller": True}
    failed = {"type": "Failed", "status": "True", "message": "too bad", "lastTransitionTime": "2027-01-15T08:00:00Z"}
    view = jobset_view(
        body(
            {"conditions": [failed, {"type": "Completed", "status": "False"}]},
            {"replicatedJobs": [job], "suspend": True},
            labels={**LABELS, names.LABEL_QUEUE: "research"},
            annotations={names.ANNOTATION_STAGE_DIGEST: "d"},
            ownerReferences=[{"uid": "somebody"}, owner],
        )
    )
    assert (view.num_pods, view.suspended, view.queue, view.owner_uid) == (16, True, "research", RUN)
    assert (view.completed, view.failed, view.failed_at, view.number, view.digest) == (False, "too bad", NOW, 3, "d")


@pytest.mark.parametrize(
    ("conditions", "reserved", "evicted", "message"),
    [
        ([], False, "", ""),
        ([{"type": "QuotaReserved", "status": "False", "message": "wait"}], False, "", "wait"),
        ([{"type": "QuotaReserved", "status": "True", "message": "ok"}], True, "", "ok"),
        (
            [
                {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "gone"},
                {"type": "QuotaReserved", "status": "False", "message": "gone"},
            ],
            False,
            "Preempted",
            "gone",
        ),
        (
            [
                {"type": "Evicted", "status": "True", "reason": "Preempted"},
                {"type": "QuotaReserved", "status": "True", "message": "ok"},
            ],
            True,
            "",
            "ok",
        ),
    ],
)
def test_a_workload_says_why_it_waits(conditions: list[Any], reserved: bool, evicted: str, message: str) -> None:
    view = workload_view(body({"conditions": conditions}))
    assert (view.reserved, view.evicted, view.message) == (reserved, evicted, message)


def test_a_status_of_another_version_is_no_status() -> None:
    view = run_view(body({"unheardOf": True, "conditions": "?"}))
    assert view.status.conditions == ()
    assert view.status_raw == {"unheardOf": True, "conditions": "?"}


def test_times_are_read_with_and_without_fractions() -> None:
    assert timestamp("2027-01-15T08:00:00Z") == NOW
    assert timestamp("2027-01-15T08:00:00.250000Z") == NOW + 0.25
    assert timestamp(None) is None


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_the_cache_only_goes_forward() -> None:
    cache = Cache()
    newer = jobset(meta=meta("a-1", resource_version="12"))
    assert cache.put(newer) == RUN
    assert cache.put(jobset(meta=meta("a-1", resource_version="9"), suspended=True)) is None
    assert cache.of_run(RUN).jobsets == (newer,)
    assert is_newer("10", "9")


def test_what_is_gone_does_not_come_back_with_a_late_answer() -> None:
    cache = Cache()
    cache.put(jobset())
    assert cache.remove("uid-a-1") == RUN
    assert cache.put(jobset(meta=meta("a-1", resource_version="99"))) is None
    assert cache.of_run(RUN).jobsets == ()
    assert cache.remove("uid-a-1") is None


def test_a_workload_may_be_heard_of_before_its_jobset() -> None:
    cache = Cache()
    assert cache.put(workload()) is None
    cache.put(jobset())
    assert cache.of_run(RUN).workloads["uid-a-1"] == workload()
    cache.put(workload(meta=meta("other"), jobset_uid="uid-other"))
    cache.remove("uid-other")
    cache.remove("uid-workload")
    assert cache.of_run(RUN).workloads == {}


def test_a_workload_may_go_after_its_jobset() -> None:
    cache = Cache()
    cache.put(jobset())
    cache.put(workload())
    cache.remove("uid-a-1")
    assert cache.remove("uid-workload") == RUN
    assert cache.of_run(RUN) == Children()


def test_objects_of_others_are_not_kept() -> None:
    cache = Cache()
    assert cache.put(pod(run_uid="")) is None
    assert cache.children == {}


def test_a_run_that_is_gone_is_told_by_its_own_uid() -> None:
    cache = Cache()
    view: RunView = run_view(body(uid="run"))
    assert cache.put_run(view)
    assert not cache.put_run(view)
    assert cache.put_run(replace(view, meta=replace(view.meta, resource_version="8")))
    assert cache.remove("run") == "run"


# -- errors and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (404, '{"kind": "Status", "reason": "NotFound", "message": "no such pod"}', NotFound),
        (404, "404 page not found\n", NotServed),
        (409, '{"kind": "Status", "reason": "AlreadyExists"}', AlreadyExists),
        (409, '{"kind": "Status", "reason": "Conflict"}', Conflict),
        (410, '{"kind": "Status", "reason": "Expired"}', Conflict),
        (403, '{"kind": "Status", "message": "exceeded quota"}', Forbidden),
        (422, '{"kind": "Status", "message": "spec.x: Invalid value"}', Invalid),
        (429, "", Unavailable),
        (500, "oops", Unavailable),
        (503, "", Unavailable),
    ],
)
def test_an_answer_becomes_its_error(status: int, text: str, kind: type[KubeError]) -> None:
    assert type(error_of(status, text)) is kind


def test_the_server_says_when_to_come_back() -> None:
    error = error_of(429, "", "7")
    assert isinstance(error, Unavailable)
    assert error.retry_after == 7.0


def test_paths_are_those_of_the_api() -> None:
    assert PODS.path("team", "p", "status") == "/api/v1/namespaces/team/pods/p/status"
    assert JOBSETS.path(None) == "/apis/jobset.x-k8s.io/v1alpha2/jobsets"


def test_writes_are_spread_out_after_a_burst() -> None:
    now = [0.0]
    bucket = TokenBucket(rate=10.0, burst=3.0, clock=lambda: now[0])
    assert [bucket.wait_seconds() for _ in range(3)] == [0.0] * 3
    assert bucket.wait_seconds() == pytest.approx(0.1)
    now[0] = 10.0
    assert bucket.wait_seconds() == 0.0
