"""Views extracted from the bodies of watched objects."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api import names
from stagecoach_operator.object_views import jobset_view, pod_view, run_view, timestamp, workload_view
from tests.operator.view_makers import NOW, RUN

LABELS = {names.LABEL_RUN_UID: RUN, names.LABEL_STAGE: "a", names.LABEL_ATTEMPT: "3"}


def body(status: dict[str, Any] | None = None, spec: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    given = {"name": "x", "namespace": "team", "uid": "u", "resourceVersion": "7", **metadata}
    return {"metadata": given, "spec": spec or {}, "status": status or {}}


def test_a_pod_view_has_attempt_node_and_start() -> None:
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


def test_a_problem_takes_precedence_over_a_normal_start() -> None:
    init = {"name": "init", "state": {"waiting": {"reason": "PodInitializing"}}}
    trainer = {"name": "trainer", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
    view = pod_view(body({"phase": "Pending", "initContainerStatuses": [init], "containerStatuses": [trainer]}))
    assert (view.waiting_reason, view.waiting_message) == ("ErrImagePull", "no such image")


def test_scheduling_failures_and_disruptions_are_extracted() -> None:
    conditions = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"},
        {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "by pod y"},
    ]
    view = pod_view(body({"phase": "Pending", "conditions": conditions}))
    assert (view.unschedulable, view.disruption) == ("0/3 nodes are available", "PreemptionByScheduler")
    gated = [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gated"}]
    assert pod_view(body({"conditions": gated})).unschedulable == ""


def test_a_jobset_view_has_its_attempt_and_end() -> None:
    job = {"replicas": 1, "template": {"spec": {"parallelism": 16}}}
    owner = {"kind": names.KIND, "uid": RUN, "controller": True}
    failed = {"type": "Failed", "status": "True", "message": "too bad", "lastTransitionTime": "2027-01-15T08:00:00Z"}
    view = jobset_view(
        body(
            {"conditions": [failed, {"type": "Completed", "status": "False"}]},
            {"replicatedJobs": [job], "suspend": True},
            labels={**LABELS, names.LABEL_QUEUE: "research"},
            annotations={names.ANNOTATION_STAGE_DIGEST: "d"},
            ownerReferences=[{"uid": "other"}, owner],
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
def test_a_workload_view_has_its_reason(conditions: list[Any], reserved: bool, evicted: str, message: str) -> None:
    view = workload_view(body({"conditions": conditions}))
    assert (view.reserved, view.evicted, view.message) == (reserved, evicted, message)


def test_a_status_of_another_version_is_read_as_empty() -> None:
    view = run_view(body({"unknownField": True, "conditions": "?"}))
    assert (view.status.conditions, view.unreadable) == ((), "")
    assert view.status_raw == {"unknownField": True, "conditions": "?"}


def test_times_are_read_with_and_without_fractions() -> None:
    assert timestamp("2027-01-15T08:00:00Z") == NOW
    assert timestamp("2027-01-15T08:00:00.250000Z") == NOW + 0.25
    assert timestamp(None) is None
