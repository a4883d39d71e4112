"""Frozen views of watched objects: the few fields the operator uses, extracted from the bodies.

Whole bodies are not kept: with a thousand runs they would dominate the operator's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from stagecoach_api import names
from stagecoach_api.outcomes import AttemptResult
from stagecoach_api.status import TrainingRunStatus
from stagecoach_api.status_reading import read_status

Raw = Mapping[str, Any]

DISRUPTION_TARGET = "DisruptionTarget"


@dataclass(frozen=True)
class Meta:
    """Metadata common to all objects."""

    uid: str
    name: str
    namespace: str
    resource_version: str
    created: float
    """Seconds since the epoch, by the API server's clock."""
    deleting: bool
    """Whether it has a deletion timestamp."""
    delete_by: float = 0.0
    """Its deletion timestamp, in seconds since the epoch; of a pod, that is the end of its grace period. 0 if it has
    none, or it is not known yet. By the API server's clock until `Children.by_own_clock` has replaced it."""
    grace_seconds: float = 0.0
    """Its grace period if it is being deleted."""


QUEUE_LABELS = (names.LABEL_QUEUE, names.LABEL_QUEUE_PRIORITY)


@dataclass(frozen=True)
class RunView:
    """A TrainingRun."""

    meta: Meta
    generation: int
    finalizers: tuple[str, ...]
    annotations: Mapping[str, str]
    """Those in our own API group only."""
    spec: Raw
    status: TrainingRunStatus
    status_raw: Raw
    """The status as the API server stores it: the base of a patch."""
    unreadable: str = ""
    """Why the status cannot be read; `status` is then empty, and must not be written. Empty if it can."""
    queue_labels: Mapping[str, str] = field(default_factory=dict)
    """Kueue's labels, which name a queue."""

    @property
    def key(self) -> tuple[str, str]:
        return self.meta.namespace, self.meta.name


@dataclass(frozen=True)
class JobSetView:
    """The JobSet of an attempt."""

    meta: Meta
    run_uid: str
    stage: str
    number: int
    digest: str
    owner_uid: str
    """UID of its controller, or empty."""
    num_pods: int
    suspended: bool
    queue: str
    """Name of its Kueue queue, or empty."""
    completed: bool
    failed: str
    """Message of its Failed condition. Empty if it has not failed."""
    failed_at: float
    excludes_nodes: bool = False
    """Whether its pods must not use nodes on which attempts failed."""


@dataclass(frozen=True)
class ContainerEnd:
    """The terminated state of a container."""

    exit_code: int
    reason: str
    """The kubelet's reason, such as `OOMKilled`."""
    message: str
    """The termination message, or the last lines of the log."""
    finished: float

    def result(self) -> AttemptResult | None:
        """Return the result the launcher wrote, or None if there is no valid one."""
        try:
            return AttemptResult.model_validate_json(self.message)
        except ValidationError:
            return None


@dataclass(frozen=True)
class PodView:
    """A pod of an attempt."""

    meta: Meta
    run_uid: str
    stage: str
    number: int
    index: int
    node: str
    phase: str
    reason: str
    """Reason of the pod's phase, such as `Evicted`."""
    message: str
    running_since: float | None
    """When its container started, in seconds since the epoch by its node's clock. None if it has not."""
    end: ContainerEnd | None
    waiting_reason: str
    """Why a container waits, such as `ImagePullBackOff`. Empty if none does."""
    waiting_message: str
    unschedulable: str
    """The scheduler's message. Empty if the pod has a node, or no attempt to schedule it was made yet."""
    disruption: str
    """Reason of the DisruptionTarget condition, or empty."""
    disruption_message: str
    digest: str = ""
    """Stage digest its attempt works on."""

    @property
    def has_ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed") or self.end is not None


@dataclass(frozen=True)
class WorkloadView:
    """Kueue's Workload for a JobSet."""

    meta: Meta
    jobset_uid: str
    reserved: bool
    """Whether quota is reserved for it."""
    reason: str
    message: str
    """Kueue's message on why it waits or was evicted."""
    evicted: str
    """Reason of the current eviction, such as `Preempted`. Empty if it is not evicted."""


# -- from bodies -------------------------------------------------------------------------------------------------------


def run_view(body: Raw) -> RunView:
    metadata = body["metadata"]
    annotations = metadata.get("annotations") or {}
    raw = body.get("status") or {}
    reading = read_status(raw)
    return RunView(
        meta=meta_of(body),
        generation=int(metadata.get("generation", 0)),
        finalizers=tuple(metadata.get("finalizers") or ()),
        annotations={key: value for key, value in annotations.items() if key.startswith(f"{names.API_GROUP}/")},
        spec=body.get("spec") or {},
        status=reading.status,
        status_raw=raw if isinstance(raw, Mapping) else {},
        unreadable=reading.unreadable,
        queue_labels={key: value for key, value in (metadata.get("labels") or {}).items() if key in QUEUE_LABELS},
    )


def jobset_view(body: Raw) -> JobSetView:
    # The labels of the pod template come last: unlike those of the JobSet, they cannot be changed.
    labels = {**(body["metadata"].get("labels") or {}), **template_labels(body)}
    annotations = body["metadata"].get("annotations") or {}
    spec = body.get("spec") or {}
    conditions = conditions_of(body)
    failed = conditions.get("Failed")
    return JobSetView(
        meta=meta_of(body),
        run_uid=labels.get(names.LABEL_RUN_UID, ""),
        stage=labels.get(names.LABEL_STAGE, ""),
        number=_number(labels.get(names.LABEL_ATTEMPT)),
        digest=annotations.get(names.ANNOTATION_STAGE_DIGEST, ""),
        owner_uid=controller_uid(body),
        num_pods=_num_pods(spec),
        suspended=bool(spec.get("suspend")),
        queue=labels.get(names.LABEL_QUEUE, ""),
        completed="Completed" in conditions,
        failed="" if failed is None else str(failed.get("message") or "the JobSet failed"),
        excludes_nodes=_excludes_nodes(spec),
        failed_at=0.0 if failed is None else timestamp(failed.get("lastTransitionTime")) or 0.0,
    )


def template_labels(jobset: Raw) -> Raw:
    """Return the labels of the Job in a JobSet. Like all of `replicatedJobs`, they cannot be changed."""
    jobs: Sequence[Raw] = (jobset.get("spec") or {}).get("replicatedJobs") or ({},)
    metadata = (jobs[0].get("template") or {}).get("metadata") or {}
    labels: Raw = metadata.get("labels") or {}
    return labels


def _excludes_nodes(spec: Raw) -> bool:
    for job in spec.get("replicatedJobs") or ():
        pod: Raw = job.get("template") or {}
        for step in ("spec", "template", "spec", "affinity", "nodeAffinity"):
            pod = pod.get(step) or {}
        if "requiredDuringSchedulingIgnoredDuringExecution" in pod:
            return True
    return False


def _num_pods(spec: Raw) -> int:
    pods = 0
    for job in spec.get("replicatedJobs") or ():
        template = (job.get("template") or {}).get("spec") or {}
        pods += int(job.get("replicas", 1)) * int(template.get("parallelism", 1))
    return pods


def pod_view(body: Raw) -> PodView:
    labels = body["metadata"].get("labels") or {}
    status = body.get("status") or {}
    conditions = conditions_of(body)
    unscheduled: Raw = next((item for item in status.get("conditions") or () if item.get("type") == "PodScheduled"), {})
    disruption = conditions.get(DISRUPTION_TARGET) or {}
    waiting = _waiting(status)
    trainer = _trainer_state(status)
    return PodView(
        meta=meta_of(body),
        run_uid=labels.get(names.LABEL_RUN_UID, ""),
        stage=labels.get(names.LABEL_STAGE, ""),
        number=_number(labels.get(names.LABEL_ATTEMPT)),
        index=_index(body),
        node=(body.get("spec") or {}).get("nodeName") or "",
        phase=status.get("phase", "Pending"),
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        running_since=timestamp((trainer.get("running") or trainer.get("terminated") or {}).get("startedAt")),
        end=_end(trainer),
        waiting_reason=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
        unschedulable=str(unscheduled.get("message") or "no node fits")
        if unscheduled.get("reason") == "Unschedulable" and unscheduled.get("status") == "False"
        else "",
        disruption=str(disruption.get("reason") or ""),
        disruption_message=str(disruption.get("message") or ""),
        digest=(body["metadata"].get("annotations") or {}).get(names.ANNOTATION_STAGE_DIGEST, ""),
    )


def _trainer_state(status: Raw) -> Raw:
    states = {item.get("name"): item.get("state") or {} for item in status.get("containerStatuses") or ()}
    state: Raw = states.get(names.TRAINER_CONTAINER) or next(iter(states.values()), {})
    return state


def _waiting(status: Raw) -> Raw:
    """Return the most informative waiting state: one that names a problem before one of a normal start."""
    found: Raw = {}
    for group in ("initContainerStatuses", "containerStatuses"):
        for item in status.get(group) or ():
            waiting = (item.get("state") or {}).get("waiting")
            if waiting and (not found or found.get("reason") in STARTUP_REASONS):
                found = waiting
    return found


STARTUP_REASONS = frozenset({"ContainerCreating", "PodInitializing"})
"""Waiting reasons of a normal start."""


def _end(state: Raw) -> ContainerEnd | None:
    ended = state.get("terminated")
    if not ended:
        return None
    return ContainerEnd(
        exit_code=int(ended.get("exitCode", 0)),
        reason=ended.get("reason") or "",
        message=ended.get("message") or "",
        finished=timestamp(ended.get("finishedAt")) or 0.0,
    )


def _index(body: Raw) -> int:
    metadata = body["metadata"]
    for group in ("labels", "annotations"):
        value = (metadata.get(group) or {}).get(names.COMPLETION_INDEX)
        if value is not None:
            return _number(value)
    return 0


def workload_view(body: Raw) -> WorkloadView:
    conditions = {item.get("type"): item for item in (body.get("status") or {}).get("conditions") or ()}
    reserved = conditions.get("QuotaReserved") or {}
    evicted = conditions.get("Evicted") or {}
    is_reserved = reserved.get("status") == "True"
    # An eviction is over once quota is reserved again, even if the condition has not been reset yet.
    return WorkloadView(
        meta=meta_of(body),
        jobset_uid=controller_uid(body, names.JOBSET_KIND),
        reserved=is_reserved,
        reason=str(reserved.get("reason") or ""),
        message=str(reserved.get("message") or evicted.get("message") or ""),
        evicted=str(evicted.get("reason") or "") if evicted.get("status") == "True" and not is_reserved else "",
    )


def meta_of(body: Raw) -> Meta:
    metadata = body["metadata"]
    return Meta(
        uid=metadata.get("uid", ""),
        name=metadata["name"],
        namespace=metadata.get("namespace", ""),
        resource_version=str(metadata.get("resourceVersion", "")),
        created=timestamp(metadata.get("creationTimestamp")) or 0.0,
        deleting=bool(metadata.get("deletionTimestamp")),
        delete_by=timestamp(metadata.get("deletionTimestamp")) or 0.0,
        grace_seconds=float(metadata.get("deletionGracePeriodSeconds") or 0.0),
    )


def controller_uid(body: Raw, kind: str | None = None) -> str:
    """Return the UID of the object's controller (of the given kind), or an empty string."""
    for owner in body["metadata"].get("ownerReferences") or ():
        if owner.get("controller") and kind in (None, owner.get("kind")):
            return str(owner.get("uid", ""))
    return ""


def conditions_of(body: Raw) -> dict[str, Raw]:
    """Return the conditions with status True, by type."""
    listed = (body.get("status") or {}).get("conditions") or ()
    return {item["type"]: item for item in listed if item.get("status") == "True"}


def timestamp(text: str | None) -> float | None:
    """Return a time (RFC 3339) as seconds since the epoch; one without an offset is UTC. Raises ValueError."""
    if not text:
        return None
    time = datetime.fromisoformat(text)
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()


def _number(text: Any) -> int:
    return int(text) if isinstance(text, str) and text.isdigit() else 0
