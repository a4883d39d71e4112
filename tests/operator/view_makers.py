"""Makers of object views: JobSets, pods and Workloads as the operator observes them."""

from __future__ import annotations

from typing import Any

from stagecoach_operator.object_views import JobSetView, Meta, PodView, WorkloadView

NOW = 1_800_000_000.0
RUN = "run-uid"
DIGEST = "d" * 64


def meta(name: str, uid: str = "", **fields: Any) -> Meta:
    given: dict[str, Any] = {"resource_version": "1", "created": NOW - 100, "deleting": False, **fields}
    return Meta(uid=uid or f"uid-{name}", name=name, namespace="team", **given)


def jobset(num_pods: int = 1, **fields: Any) -> JobSetView:
    given: dict[str, Any] = {
        "meta": meta("a-1"),
        "run_uid": RUN,
        "stage": "a",
        "number": 1,
        "digest": DIGEST,
        "owner_uid": RUN,
        "num_pods": num_pods,
        "suspended": False,
        "queue": "",
        "completed": False,
        "failed": "",
        "failed_at": 0.0,
        **fields,
    }
    return JobSetView(**given)


def pod(index: int = 0, **fields: Any) -> PodView:
    """A running pod."""
    given: dict[str, Any] = {
        "meta": meta(f"a-{index}"),
        "run_uid": RUN,
        "stage": "a",
        "number": 1,
        "index": index,
        "node": f"node-{index}",
        "phase": "Running",
        "reason": "",
        "message": "",
        "running_since": NOW - 50,
        "end": None,
        "waiting_reason": "",
        "waiting_message": "",
        "unschedulable": "",
        "disruption": "",
        "disruption_message": "",
        **fields,
    }
    return PodView(**given)


def pending(index: int = 0, **fields: Any) -> PodView:
    return pod(index, **{"phase": "Pending", "running_since": None, **fields})


def workload(**fields: Any) -> WorkloadView:
    given: dict[str, Any] = {
        "meta": meta("workload"),
        "jobset_uid": "uid-a-1",
        "reserved": False,
        "reason": "Pending",
        "message": "couldn't assign flavors to pod set w: insufficient quota",
        "evicted": "",
        **fields,
    }
    return WorkloadView(**given)
