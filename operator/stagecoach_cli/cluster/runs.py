"""A run of a cluster, read from its TrainingRun object: its snapshot, as for a local run, and its warnings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from stagecoach_api import names
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.outcomes import Cause
from stagecoach_api.progress import ProgressEvent
from stagecoach_api.spec import Storage
from stagecoach_api.status import (
    AttemptStatus,
    Condition,
    ConditionStatus,
    ConditionType,
    Reason,
    StageProgress,
    StageStatus,
    TrainingRunStatus,
)
from stagecoach_api.status_reading import read_status
from stagecoach_cli.artifacts.store import split_uri
from stagecoach_cli.cluster.api import Body, ClusterError
from stagecoach_cli.display.reports import StageReport
from stagecoach_core.snapshot import Snapshot, StageRow
from stagecoach_core.values import Found, RunState, StageState, StageView

HEALTHY = frozenset({Reason.STAGES_RUNNING, Reason.NOTHING_TO_DO})
"""Reasons of `Progressing` that are not worth a warning."""

_DIGEST = re.compile(r"artifacts/([0-9a-f]{64})")


@dataclass(frozen=True)
class ClusterAttempt:
    """One attempt of a cluster's run, by which its pods and logs are found."""

    stage: str
    number: int
    digest: str
    """Stage digest."""
    started: float
    """Seconds since the epoch."""
    ended: bool


@dataclass(frozen=True)
class ClusterRun:
    """One run as of one response of the API server."""

    namespace: str
    name: str
    uid: str
    generation: int
    spec: Mapping[str, Any]
    """The object's `spec`, unparsed."""
    status: TrainingRunStatus
    deleting: bool = False

    @property
    def title(self) -> str:
        return f"{self.namespace}/{self.name}"

    # -- the run -------------------------------------------------------------------------------------------------------

    @property
    def is_observed(self) -> bool:
        """Whether the status reflects the newest spec (`observedGeneration`)."""
        return self.status.observed_generation >= self.generation

    @property
    def state(self) -> RunState:
        summary = self.status.summary
        return RunState.PROGRESSING if summary is None else summary.state

    def condition(self, kind: ConditionType) -> Condition | None:
        return next((item for item in self.status.conditions if item.type is kind), None)

    def is_true(self, kind: ConditionType) -> bool:
        """Whether a condition is True for the newest spec."""
        condition = self.condition(kind)
        return self.is_observed and condition is not None and condition.status is ConditionStatus.TRUE

    @property
    def rejection(self) -> Condition | None:
        """The `Accepted` condition if the operator rejects the newest spec; None if it does not, or not yet."""
        condition = self.condition(ConditionType.ACCEPTED)
        is_rejected = self.is_observed and condition is not None and condition.status is ConditionStatus.FALSE
        return condition if is_rejected else None

    @property
    def is_cancelled(self) -> bool:
        condition = self.condition(ConditionType.FAILED)
        return self.is_true(ConditionType.FAILED) and condition is not None and condition.reason is Reason.CANCELLED

    @property
    def is_over(self) -> bool:
        """Whether the run has stopped making progress for good (a suspension does not count)."""
        return self.is_true(ConditionType.COMPLETE) or self.is_true(ConditionType.FAILED)

    @property
    def storage(self) -> Storage | None:
        """The storage of its artifacts; None if that is the operator's default and no artifact shows its URI yet."""
        storage = Storage.model_validate(self.spec.get("storage") or {})
        if storage.uri is not None:
            return storage
        uris = [stage.artifact.uri for stage in self.status.stages if stage.artifact is not None]
        parts = next((parts for uri in uris if (parts := split_uri(uri)) is not None), None)
        return None if parts is None else storage.model_copy(update={"uri": parts[0]})

    # -- its stages ----------------------------------------------------------------------------------------------------

    def stage_spec(self, name: str) -> Mapping[str, Any]:
        return next((stage for stage in self.spec.get("stages") or () if stage.get("name") == name), {})

    def resource(self, stage: str, field: str) -> int:
        """Return a count of a stage's resources, its own or the run's default; 0 if neither is set."""
        own = self.stage_spec(stage).get("resources") or {}
        inherited = (self.spec.get("defaults") or {}).get("resources") or {}
        return int(own.get(field, inherited.get(field)) or 0)

    def num_pods(self, stage: str) -> int:
        return self.resource(stage, "nodes") or 1

    def ranks_per_pod(self, stage: str) -> int:
        return self.resource(stage, "gpusPerNode") or self.resource(stage, "ranksPerNode") or 1

    def attempts(self) -> list[ClusterAttempt]:
        """Return the attempts in the status, in the order of their start."""
        found = [_attempt(stage.name, record) for stage in self.status.stages for record in stage.attempts]
        return sorted(found, key=lambda item: (item.started, item.stage, item.number))

    def selector(self, attempt: ClusterAttempt) -> str:
        """Return the label selector of an attempt's pods."""
        labels = {
            names.LABEL_RUN_UID: self.uid,
            names.LABEL_STAGE: attempt.stage,
            names.LABEL_ATTEMPT: str(attempt.number),
        }
        return ",".join(f"{name}={value}" for name, value in labels.items())


def cluster_run(body: Body) -> ClusterRun:
    """Parse a run. Raises ClusterError if this version cannot parse its status."""
    metadata = body["metadata"]
    title = f"{metadata['namespace']}/{metadata['name']}"
    reading = read_status(body.get("status"))
    if reading.unreadable:
        raise ClusterError(
            f"the status of {title} was written by another version of the operator ({reading.unreadable}); "
            "install the same version of `stagecoach` as the operator's"
        )
    return ClusterRun(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=int(metadata.get("generation", 0)),
        spec=body.get("spec") or {},
        status=reading.status,
        deleting="deletionTimestamp" in metadata,
    )


def _attempt(stage: str, record: AttemptStatus) -> ClusterAttempt:
    return ClusterAttempt(stage, record.number, record.digest, record.started.timestamp(), record.ended is not None)


def digests_in_use(body: Body) -> set[str]:
    """Return every stage digest that a run uses: of its stages, of its live attempts, and in its inputs."""
    run = cluster_run(body)
    found = {stage.digest for stage in run.status.stages if stage.digest is not None}
    found |= {stage.artifact.stage_digest for stage in run.status.stages if stage.artifact is not None}
    found |= {record.digest for stage in run.status.stages for record in stage.attempts if record.ended is None}
    return found | {match for text in _texts(run.spec) for match in _DIGEST.findall(text)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# -- snapshot ----------------------------------------------------------------------------------------------------------


def snapshot_of(run: ClusterRun, now: float) -> Snapshot:
    """Return the run's snapshot. `now`: seconds since the epoch."""
    storage = run.storage
    statuses = {stage.name: stage for stage in run.status.stages}
    stage_names = list(statuses) or [stage["name"] for stage in run.spec.get("stages") or ()]
    return Snapshot(
        run=run.name,
        storage="" if storage is None else storage.uri or "",
        state=run.state,
        now=now,
        rows=tuple(_row(run, name, statuses.get(name), now) for name in stage_names),
        message=_message(run),
    )


def _message(run: ClusterRun) -> str:
    condition = run.condition(ConditionType.FAILED)
    failed = condition is not None and condition.status is ConditionStatus.TRUE
    return condition.message if failed and condition is not None else ""


def _row(run: ClusterRun, name: str, stage: StageStatus | None, now: float) -> StageRow:
    spec = run.stage_spec(name)
    kind = next((kind for kind in STAGE_KINDS if spec.get(kind) is not None), "")
    ranks = run.num_pods(name) * run.ranks_per_pod(name)
    if stage is None:
        return StageRow(name, kind, StageView(StageState.PENDING, waiting_for="the operator"), ranks=ranks)
    return StageRow(
        name=name,
        kind=kind,
        view=_view(stage),
        progress=None if stage.progress is None else _event(stage.progress, now),
        started=stage.attempts[-1].started.timestamp() if stage.attempts else None,
        seconds=_seconds(stage.started, stage.finished) if stage.state is StageState.SUCCEEDED else None,
        ranks=ranks,
        eta=None if stage.progress is None or stage.progress.eta is None else stage.progress.eta.timestamp(),
    )


def _view(stage: StageStatus) -> StageView:
    artifact = stage.artifact
    found = None if artifact is None else Found(artifact.stage_digest, artifact.content_digest, artifact.uri)
    restarts = {cause: count for cause in Cause if (count := getattr(stage.restarts, cause.value))}
    return StageView(
        state=stage.state,
        digest=stage.digest,
        artifact=found,
        attempt=stage.attempt,
        restarts=restarts,
        waiting_for=stage.waiting_for,
        message=stage.message,
    )


def _event(progress: StageProgress, now: float) -> ProgressEvent:
    total = None if progress.total is None else float(progress.total)
    return ProgressEvent(
        time=now, activity=progress.activity or "running", done=float(progress.done), total=total, unit=progress.unit
    )


def _seconds(started: datetime | None, finished: datetime | None) -> float | None:
    return None if started is None or finished is None else (finished - started).total_seconds()


# -- warnings ----------------------------------------------------------------------------------------------------------


def warnings_of(run: ClusterRun) -> list[str]:
    """Return the lines to show below the table: the conditions that need attention, with their messages unchanged."""
    if run.deleting:
        return ["the run is being deleted: it is removed when its pods have ended"]
    if not run.status.conditions:
        return ["no operator has seen the run yet; check that an operator watches this namespace"]
    lines = [] if run.is_observed else ["the operator has not seen the newest edit yet"]
    return lines + [_line(item) for item in run.status.conditions if _needs_attention(item, run)]


def stage_reports(run: ClusterRun) -> dict[str, StageReport]:
    """Return the warnings of the stages, as far as their newest attempts in the status have them."""
    newest = {stage.name: stage.attempts[-1] for stage in run.status.stages if stage.attempts}
    return {name: StageReport(warnings=record.warnings) for name, record in newest.items() if record.warnings}


def _line(condition: Condition) -> str:
    message = f": {condition.message}" if condition.message else ""
    return f"{condition.type} is {condition.status}, {condition.reason}{message}"


def _needs_attention(condition: Condition, run: ClusterRun) -> bool:
    holds = condition.status is ConditionStatus.TRUE
    match condition.type:
        case ConditionType.ACCEPTED | ConditionType.PLANNED | ConditionType.QUOTA_RESERVED:
            return not holds
        case ConditionType.PROGRESSING:
            if condition.reason in HEALTHY or (run.rejection is not None and not holds):
                return False
            return not holds or bool(condition.message)
        case ConditionType.SUSPENDED:
            return holds or condition.reason is Reason.STOPPING_STAGES
        case ConditionType.FAILED:
            return holds
        case _:
            return False
