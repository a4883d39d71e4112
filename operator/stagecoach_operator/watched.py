"""What is kept of the objects that are watched: a few fields each, frozen, and a cache of the newest of them.

Whole bodies are not kept: at a thousand runs they would be the operator's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from stagecoach_api import names
from stagecoach_api.outcomes import AttemptResult
from stagecoach_api.status import TrainingRunStatus

Raw = Mapping[str, Any]

DISRUPTION_TARGET = "DisruptionTarget"


@dataclass(frozen=True)
class Meta:
    """What every object has."""

    uid: str
    name: str
    namespace: str
    resource_version: str
    created: float
    """Seconds since the epoch, by the API server's clock."""
    deleting: bool
    """It has a deletion timestamp."""


@dataclass(frozen=True)
class RunView:
    """A TrainingRun."""

    meta: Meta
    generation: int
    finalizers: tuple[str, ...]
    annotations: Mapping[str, str]
    """Those of our own group only."""
    spec: Raw
    status: TrainingRunStatus
    status_raw: Raw
    """The status as the API server has it, to which a patch is computed."""

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
    """UID of its controller. Empty: it has none."""
    num_pods: int
    suspended: bool
    queue: str
    """Name of its Kueue queue. Empty: none."""
    completed: bool
    failed: str
    """Message of its Failed condition. Empty: it has not failed."""
    failed_at: float


@dataclass(frozen=True)
class ContainerEnd:
    """How a container ended."""

    exit_code: int
    reason: str
    """Kubernetes' word, such as `OOMKilled`."""
    message: str
    """The termination message, or the last lines of the log."""
    finished: float

    def result(self) -> AttemptResult | None:
        """Return what the launcher left. None: nothing that can be read."""
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
    """The pod's own reason, such as `Evicted`."""
    message: str
    running_since: float | None
    """When its container started, in seconds since the epoch by its node's clock. None: it has not."""
    end: ContainerEnd | None
    waiting_reason: str
    """Why a container waits, such as `ImagePullBackOff`. Empty: none does."""
    waiting_message: str
    unschedulable: str
    """The scheduler's message. Empty: it has found a node, or has not looked yet."""
    disruption: str
    """Reason of a DisruptionTarget condition. Empty: there is none."""
    disruption_message: str

    @property
    def has_ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed") or self.end is not None


@dataclass(frozen=True)
class WorkloadView:
    """Kueue's Workload of a JobSet."""

    meta: Meta
    jobset_uid: str
    reserved: bool
    """Quota is reserved for it."""
    reason: str
    message: str
    """Why it waits, or was evicted, as Kueue says it."""
    evicted: str
    """Reason of an eviction that still stands, such as `Preempted`. Empty: it is not evicted."""


Child = JobSetView | PodView | WorkloadView

# -- from bodies -------------------------------------------------------------------------------------------------------


def run_view(body: Raw) -> RunView:
    metadata = body["metadata"]
    annotations = metadata.get("annotations") or {}
    raw = body.get("status") or {}
    return RunView(
        meta=meta_of(body),
        generation=int(metadata.get("generation", 0)),
        finalizers=tuple(metadata.get("finalizers") or ()),
        annotations={key: value for key, value in annotations.items() if key.startswith(f"{names.API_GROUP}/")},
        spec=body.get("spec") or {},
        status=_status(raw),
        status_raw=raw,
    )


def _status(raw: Raw) -> TrainingRunStatus:
    """Return the status, or an empty one where another version of the operator wrote what this one cannot read."""
    try:
        return TrainingRunStatus.model_validate_json(json.dumps(raw))
    except ValidationError:
        return TrainingRunStatus()


def jobset_view(body: Raw) -> JobSetView:
    labels = body["metadata"].get("labels") or {}
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
        failed_at=0.0 if failed is None else timestamp(failed.get("lastTransitionTime")) or 0.0,
    )


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
    )


def _trainer_state(status: Raw) -> Raw:
    states = {item.get("name"): item.get("state") or {} for item in status.get("containerStatuses") or ()}
    state: Raw = states.get(names.TRAINER_CONTAINER) or next(iter(states.values()), {})
    return state


def _waiting(status: Raw) -> Raw:
    """Return the waiting state that says most: one that names trouble before one that says it goes on."""
    found: Raw = {}
    for group in ("initContainerStatuses", "containerStatuses"):
        for item in status.get(group) or ():
            waiting = (item.get("state") or {}).get("waiting")
            if waiting and (not found or found.get("reason") in GOES_ON):
                found = waiting
    return found


GOES_ON = frozenset({"ContainerCreating", "PodInitializing"})
"""Waiting reasons that are no trouble by themselves."""


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
    says = reserved if reserved else {}
    return WorkloadView(
        meta=meta_of(body),
        jobset_uid=controller_uid(body, names.JOBSET_KIND),
        reserved=is_reserved,
        reason=str(says.get("reason") or ""),
        message=str(says.get("message") or evicted.get("message") or ""),
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
    )


def controller_uid(body: Raw, kind: str | None = None) -> str:
    """Return the UID of the object's controller (of this kind). Empty: it has none."""
    for owner in body["metadata"].get("ownerReferences") or ():
        if owner.get("controller") and kind in (None, owner.get("kind")):
            return str(owner.get("uid", ""))
    return ""


def conditions_of(body: Raw) -> dict[str, Raw]:
    """Return the conditions that hold, by type."""
    listed = (body.get("status") or {}).get("conditions") or ()
    return {item["type"]: item for item in listed if item.get("status") == "True"}


def timestamp(text: str | None) -> float | None:
    """Return Kubernetes' time as seconds since the epoch."""
    if not text:
        return None
    return datetime.fromisoformat(text.replace("Z", "+00:00")).replace(tzinfo=UTC).timestamp()


def _number(text: Any) -> int:
    return int(text) if isinstance(text, str) and text.isdigit() else 0


# -- the cache ---------------------------------------------------------------------------------------------------------

TOMBSTONES = 20_000
"""UIDs of deleted objects that are remembered, so that a late answer about one does not bring it back."""


MAX_EARLY = 2000


@dataclass
class Cache:
    """The newest of every watched object, from the watches and from the answers to our own writes."""

    runs: dict[str, RunView] = field(default_factory=dict)
    """By UID."""
    children: dict[str, Child] = field(default_factory=dict)
    """By UID."""
    _of_run: dict[str, set[str]] = field(default_factory=dict)
    _run_of: dict[str, str] = field(default_factory=dict)
    """UID of the run by that of the object; a Workload outlives the JobSet through which it was found."""
    _run_of_jobset: dict[str, str] = field(default_factory=dict)
    _gone: dict[str, None] = field(default_factory=dict)
    _early: dict[str, WorkloadView] = field(default_factory=dict)
    """Workloads of JobSets that are not known (yet, or because they are others'), by the JobSets' UID."""

    def put_run(self, view: RunView) -> bool:
        """Take a run in; return whether it is news."""
        if not self._is_news(view.meta, self.runs.get(view.meta.uid)):
            return False
        self.runs[view.meta.uid] = view
        return True

    def put(self, view: Child) -> str | None:
        """Take an object in; return the UID of the run it belongs to if it is news. None: it is not, or not ours."""
        run_uid = self.run_of(view)
        if run_uid is None and isinstance(view, WorkloadView):
            self._keep_early(view)
        if run_uid is None or not self._is_news(view.meta, self.children.get(view.meta.uid)):
            return None
        self.children[view.meta.uid] = view
        self._of_run.setdefault(run_uid, set()).add(view.meta.uid)
        self._run_of[view.meta.uid] = run_uid
        if isinstance(view, JobSetView):
            self._run_of_jobset[view.meta.uid] = run_uid
            early = self._early.pop(view.meta.uid, None)
            if early is not None:
                self.put(early)
        return run_uid

    def _keep_early(self, view: WorkloadView) -> None:
        """Keep a Workload that is heard of before its JobSet: two watches keep no order between them."""
        if not view.jobset_uid or view.meta.uid in self._gone:
            return
        known = self._early.get(view.jobset_uid)
        if known is None or self._is_news(view.meta, known):
            self._early[view.jobset_uid] = view
        while len(self._early) > MAX_EARLY:
            del self._early[next(iter(self._early))]

    def remove(self, uid: str) -> str | None:
        """Forget a deleted object; return the UID of the run it belonged to (or was). None: it was not known."""
        self._gone[uid] = None
        while len(self._gone) > TOMBSTONES:
            del self._gone[next(iter(self._gone))]
        if self.runs.pop(uid, None) is not None:
            return uid
        child = self.children.pop(uid, None)
        if child is None:
            self._early = {key: view for key, view in self._early.items() if view.meta.uid != uid}
            return None
        self._run_of_jobset.pop(uid, None)
        run_uid = self._run_of.pop(uid)
        self._of_run[run_uid].discard(uid)
        if not self._of_run[run_uid]:
            del self._of_run[run_uid]
        return run_uid

    def mark_deleting(self, uid: str) -> None:
        """Note that we have asked for an object's deletion; the watch will say the same."""
        child = self.children.get(uid)
        if child is not None:
            self.children[uid] = replace(child, meta=replace(child.meta, deleting=True))

    def run_of(self, view: Child) -> str | None:
        """Return the UID of the run an object belongs to. None: to none that is known."""
        if isinstance(view, WorkloadView):
            return self._run_of_jobset.get(view.jobset_uid)
        return view.run_uid or None

    def of_run(self, run_uid: str) -> Children:
        """Return the objects of a run."""
        members = [self.children[uid] for uid in sorted(self._of_run.get(run_uid, ()))]
        return Children(
            jobsets=tuple(item for item in members if isinstance(item, JobSetView)),
            pods=tuple(item for item in members if isinstance(item, PodView)),
            workloads={item.jobset_uid: item for item in members if isinstance(item, WorkloadView)},
        )

    def _is_news(self, meta: Meta, known: RunView | Child | None) -> bool:
        if meta.uid in self._gone:
            return False
        return known is None or is_newer(meta.resource_version, known.meta.resource_version)


def is_newer(version: str, than: str) -> bool:
    """Compare resource versions, which are decimal numbers (Kubernetes promises it since 1.35)."""
    if version.isdigit() and than.isdigit():
        return int(version) > int(than)
    return version != than


@dataclass(frozen=True)
class Children:
    """The objects of one run."""

    jobsets: tuple[JobSetView, ...] = ()
    pods: tuple[PodView, ...] = ()
    workloads: Mapping[str, WorkloadView] = field(default_factory=dict)
    """By UID of their JobSet."""

    def pods_of(self, stage: str, number: int) -> tuple[PodView, ...]:
        """Return the pods of an attempt, by index, the newest of each index first."""
        own = [pod for pod in self.pods if (pod.stage, pod.number) == (stage, number)]
        return tuple(sorted(own, key=lambda pod: (pod.index, -pod.meta.created)))


def newest_runs(views: Iterable[RunView]) -> list[RunView]:
    """Sort runs so that those made last come last."""
    return sorted(views, key=lambda view: (view.meta.created, view.meta.uid))
