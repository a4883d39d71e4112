"""Why an attempt's pods are not all running. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagecoach_api.status import Reason
from stagecoach_core.values import WaitKind
from stagecoach_operator.object_views import STARTUP_REASONS, JobSetView, PodView, WorkloadView

# Reasons of a waiting container, as the kubelet sets them.
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

KINDS: Mapping[str, WaitKind] = {
    Reason.WAITING_FOR_QUOTA: WaitKind.QUOTA,
    Reason.PREEMPTED: WaitKind.QUOTA,
    Reason.UNSCHEDULABLE: WaitKind.SCHEDULING,
    Reason.CREATION_REFUSED: WaitKind.SCHEDULING,
    Reason.IMAGE_UNAVAILABLE: WaitKind.IMAGE,
    Reason.SECRET_MISSING: WaitKind.IMAGE,
    Reason.WAITING_FOR_PODS: WaitKind.PODS,
}
"""Which deadline applies while an attempt waits for a reason; the core ends it (`policies.waiting`)."""
STUCK_SECONDS = 4.0
"""The events of a pod whose containers are created for longer than this are read: they name the reason."""


@dataclass(frozen=True)
class Waiting:
    """Why an attempt is not running yet."""

    reason: Reason
    message: str


def waiting_for(
    jobset: JobSetView, pods: Sequence[PodView], workload: WorkloadView | None, warnings: Mapping[str, str]
) -> Waiting | None:
    """Return why an attempt is not running, or None if all its pods run.

    `warnings`: newest warning event of stuck pods, and of JobSets without pods, by UID.
    """
    # Running pods prove the admission: two watches have no common order, so the Workload's event may arrive later.
    if jobset.queue and (workload is None or not workload.reserved) and not _any_runs(pods):
        return _quota(jobset, workload)
    creation_warning = warnings.get(jobset.meta.uid, "")
    if not pods and creation_warning:
        return Waiting(Reason.CREATION_REFUSED, creation_warning)
    waits = [wait for pod in pods if (wait := _pod_waiting(pod, warnings.get(pod.meta.uid, ""))) is not None]
    if waits:
        return min(waits, key=lambda wait: _RANK.index(wait.reason))
    # A pod that has ended did run: an attempt must not appear to wait while its last pods end.
    running = sum(pod.running_since is not None or pod.has_ended for pod in pods)
    if running >= max(1, jobset.num_pods):
        return None
    return Waiting(Reason.WAITING_FOR_PODS, f"{running} of {jobset.num_pods} pods run")


def stuck_pods(pods: Sequence[PodView], since: float, now: float) -> list[PodView]:
    """Return the pods whose containers have been created for too long without a reason in the pod's status.

    `since`: when the attempt was first seen to wait, by the same clock as `now`.
    A missing Secret or volume appears in the pod's events only; its waiting reason stays `ContainerCreating`.
    """
    return [
        pod
        for pod in pods
        if pod.waiting_reason in STARTUP_REASONS and pod.node and not pod.meta.deleting and now > since + STUCK_SECONDS
    ]


_RANK = (Reason.SECRET_MISSING, Reason.IMAGE_UNAVAILABLE, Reason.UNSCHEDULABLE, Reason.WAITING_FOR_PODS)
"""The reason to report when pods wait for different ones: the first of these, which a user can act on."""


def _any_runs(pods: Sequence[PodView]) -> bool:
    return any(pod.running_since is not None for pod in pods)


def _quota(jobset: JobSetView, workload: WorkloadView | None) -> Waiting:
    if workload is None:
        return Waiting(Reason.WAITING_FOR_QUOTA, f"queue `{jobset.queue}`: Kueue has not created a Workload yet")
    reason = Reason.PREEMPTED if workload.evicted else Reason.WAITING_FOR_QUOTA
    # Kueue's own message is passed on: it names the resource and the ClusterQueue that prevent the admission.
    return Waiting(reason, workload.message or f"queue `{jobset.queue}`: waiting for quota")


def _pod_waiting(pod: PodView, warning: str) -> Waiting | None:
    """Return what a single pod waits for, or None if there is nothing unusual about it."""
    name = pod.meta.name
    if pod.waiting_reason in IMAGE_REASONS:
        return Waiting(Reason.IMAGE_UNAVAILABLE, f"pod {name}: {pod.waiting_reason}: {pod.waiting_message}")
    if pod.waiting_reason in CONFIG_REASONS or _names_missing_secret(warning):
        message = f"pod {name}: {pod.waiting_message or warning}"
        if "secret" in message.lower():
            return Waiting(Reason.SECRET_MISSING, message)
        return Waiting(Reason.WAITING_FOR_PODS, message)
    if pod.unschedulable:
        return Waiting(Reason.UNSCHEDULABLE, f"pod {name}: {pod.unschedulable}")
    if warning:
        return Waiting(Reason.WAITING_FOR_PODS, f"pod {name}: {warning}")
    return None


def _names_missing_secret(warning: str) -> bool:
    return "not found" in warning.lower() and "secret" in warning.lower()
