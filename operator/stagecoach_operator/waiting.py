"""What an attempt whose pods do not all run waits for, and how long that may be borne. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagecoach_api.status import Reason
from stagecoach_operator.watched import GOES_ON, JobSetView, PodView, WorkloadView

IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})

IMAGE_PATIENCE_SECONDS = 300.0
"""A registry may be away for a while, and the kubelet tries again by itself."""
SECRET_PATIENCE_SECONDS = 60.0
"""After that the attempt ends, uncharged, and gives its quota back until it is tried again."""
STUCK_SECONDS = 4.0
"""A pod that creates its containers for longer than this is asked about: its events say what it waits for."""


@dataclass(frozen=True)
class Waiting:
    """What an attempt waits for."""

    reason: Reason
    message: str
    give_up_at: float | None = None
    """When the attempt is ended, uncharged, if this stands; seconds since the epoch. None: it may wait for ever."""


def waiting_for(
    jobset: JobSetView, pods: Sequence[PodView], workload: WorkloadView | None, troubles: Mapping[str, str]
) -> Waiting | None:
    """Return what an attempt waits for. None: all its pods run.

    `troubles`: what the events of stuck pods say, by UID.
    """
    if jobset.queue and (workload is None or not workload.reserved) and not _any_runs(pods):
        return _quota(jobset, workload)
    refused = troubles.get(jobset.meta.uid, "")
    if not pods and refused:
        return Waiting(Reason.CREATION_REFUSED, refused)
    found = [trouble for pod in pods if (trouble := _trouble(pod, troubles.get(pod.meta.uid, ""))) is not None]
    if found:
        return min(found, key=lambda item: _RANK.index(item.reason))
    running = sum(pod.running_since is not None or pod.has_ended for pod in pods)
    if running >= max(1, jobset.num_pods):
        return None
    return Waiting(Reason.WAITING_FOR_PODS, f"{running} of {jobset.num_pods} pods run")


def stuck_pods(pods: Sequence[PodView], now: float) -> list[PodView]:
    """Return the pods that have been creating their containers for too long without saying why."""
    return [
        pod
        for pod in pods
        if pod.waiting_reason in GOES_ON
        and pod.node
        and not pod.meta.deleting
        and now > pod.meta.created + STUCK_SECONDS
    ]


_RANK = (Reason.SECRET_MISSING, Reason.IMAGE_UNAVAILABLE, Reason.UNSCHEDULABLE, Reason.WAITING_FOR_PODS)


def _any_runs(pods: Sequence[PodView]) -> bool:
    return any(pod.running_since is not None for pod in pods)


def _quota(jobset: JobSetView, workload: WorkloadView | None) -> Waiting:
    if workload is None:
        return Waiting(Reason.WAITING_FOR_QUOTA, f"queue `{jobset.queue}`: Kueue has not taken it up yet")
    reason = Reason.PREEMPTED if workload.evicted else Reason.WAITING_FOR_QUOTA
    return Waiting(reason, workload.message or f"queue `{jobset.queue}`: waiting for quota")


def _trouble(pod: PodView, events: str) -> Waiting | None:
    name = pod.meta.name
    if pod.waiting_reason in IMAGE_REASONS:
        said = f"pod {name}: {pod.waiting_reason}: {pod.waiting_message}"
        return Waiting(Reason.IMAGE_UNAVAILABLE, said, pod.meta.created + IMAGE_PATIENCE_SECONDS)
    if pod.waiting_reason in CONFIG_REASONS or _names_missing(events):
        said = f"pod {name}: {pod.waiting_message or events}"
        if "secret" in said.lower():
            return Waiting(Reason.SECRET_MISSING, said, pod.meta.created + SECRET_PATIENCE_SECONDS)
        return Waiting(Reason.WAITING_FOR_PODS, said)
    if pod.unschedulable:
        return Waiting(Reason.UNSCHEDULABLE, f"pod {name}: {pod.unschedulable}")
    if events:
        return Waiting(Reason.WAITING_FOR_PODS, f"pod {name}: {events}")
    return None


def _names_missing(events: str) -> bool:
    return "not found" in events.lower() and "secret" in events.lower()
