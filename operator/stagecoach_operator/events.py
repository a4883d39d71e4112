"""Kubernetes Events for the changes between two statuses, with stable reasons.

The name of an Event is derived from its contents: after a restart the API server answers a repeated one with 409.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stagecoach_api import names
from stagecoach_api.outcomes import Cause
from stagecoach_api.status import (
    Condition,
    ConditionStatus,
    ConditionType,
    Reason,
    StageState,
    StageStatus,
    TrainingRunStatus,
)
from stagecoach_operator.attempt_times import moment
from stagecoach_operator.object_views import RunView

COMPONENT = "stagecoach-operator"


class EventReason(StrEnum):
    """Reasons of Events. They are part of the API: programs may rely on them."""

    ACCEPTED = "Accepted"
    REFUSED = "Refused"
    STAGE_STARTED = "StageStarted"
    STAGE_SUCCEEDED = "StageSucceeded"
    STAGE_CACHED = "StageCached"
    STAGE_FAILED = "StageFailed"
    ATTEMPT_FAILED = "AttemptFailed"
    ATTEMPT_STOPPED = "AttemptStopped"
    NODE_LOST = "NodeLost"
    NODES_AVOIDED = "NodesAvoided"
    UNHEARD = "Unheard"
    ARTIFACT_LOST = "ArtifactLost"
    BLOCKED = "Blocked"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    COMPLETE = "Complete"
    FAILED = "Failed"


@dataclass(frozen=True)
class RunEvent:
    """One event of a run."""

    reason: EventReason
    message: str
    warning: bool = False


def events_between(before: TrainingRunStatus, after: TrainingRunStatus) -> list[RunEvent]:
    """Return the events for the changes from one status to the next."""
    previous = {stage.name: stage for stage in before.stages}
    events = list(_of_conditions(before, after))
    for stage in after.stages:
        events += _of_stage(previous.get(stage.name), stage)
    return events


def _of_stage(before: StageStatus | None, after: StageStatus) -> Iterator[RunEvent]:
    old_state = None if before is None else before.state
    known = {} if before is None else {record.number: record for record in before.attempts}
    for record in after.attempts:
        old = known.get(record.number)
        if old is None:
            yield RunEvent(EventReason.STAGE_STARTED, f"stage `{after.name}`: attempt {record.number} is created")
        if record.ended is None or (old is not None and old.ended is not None) or record.cause is None:
            continue
        where = "".join(f", {label} {value}" for label, value in (("pod", record.pod), ("node", record.node)) if value)
        text = f"stage `{after.name}`: attempt {record.number} ended ({record.cause}{where}): {record.message}"
        requested = record.stop_cause not in (None, Cause.INFRASTRUCTURE)
        yield RunEvent(
            EventReason.ATTEMPT_STOPPED if requested else EventReason.ATTEMPT_FAILED, text, warning=not requested
        )
    if after.state is old_state:
        return
    if after.state is StageState.SUCCEEDED:
        yield RunEvent(EventReason.STAGE_SUCCEEDED, f"stage `{after.name}` has finished")
    elif after.state is StageState.CACHED:
        yield RunEvent(EventReason.STAGE_CACHED, f"stage `{after.name}`: its artifact was found")
    elif after.state is StageState.FAILED:
        yield RunEvent(EventReason.STAGE_FAILED, f"stage `{after.name}`: {after.message}", warning=True)


BLOCKING = frozenset(
    {
        Reason.IMAGE_UNAVAILABLE,
        Reason.SECRET_MISSING,
        Reason.UNSCHEDULABLE,
        Reason.JOBSET_NOT_INSTALLED,
        Reason.CREATION_REFUSED,
        Reason.STORAGE_UNREACHABLE,
    }
)


def _of_conditions(before: TrainingRunStatus, after: TrainingRunStatus) -> Iterator[RunEvent]:
    old = {condition.type: condition for condition in before.conditions}
    for condition in after.conditions:
        previous = old.get(condition.type)
        event = _of_condition(condition, previous)
        if event is not None:
            yield event


def _of_condition(now: Condition, before: Condition | None) -> RunEvent | None:  # noqa: PLR0911 - one per case
    changed = before is None or before.status is not now.status
    holds = now.status is ConditionStatus.TRUE
    match now.type:
        case ConditionType.ACCEPTED if changed and holds:
            return RunEvent(EventReason.ACCEPTED, "the run is valid")
        case ConditionType.ACCEPTED if not holds and (before is None or before.message != now.message):
            return RunEvent(EventReason.REFUSED, now.message, warning=True)
        case ConditionType.PROGRESSING if now.reason in BLOCKING and (
            before is None or before.reason is not now.reason
        ):
            return RunEvent(EventReason.BLOCKED, f"{now.reason}: {now.message}", warning=True)
        case ConditionType.SUSPENDED if changed and (holds or before is not None):
            reason = EventReason.SUSPENDED if holds else EventReason.RESUMED
            return RunEvent(reason, now.message or ("the run is suspended" if holds else "the run is resumed"))
        case ConditionType.COMPLETE if changed and holds:
            return RunEvent(EventReason.COMPLETE, now.message)
        case ConditionType.FAILED if changed and holds:
            return RunEvent(EventReason.FAILED, now.message, warning=True)
    return None


def event_body(run: RunView, event: RunEvent, now: float) -> dict[str, Any]:
    """Return the Event object for the API server."""
    identity = f"{run.meta.uid}/{run.generation}/{event.reason}/{event.message}"
    stamp = moment(now).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{run.meta.name}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
            "namespace": run.meta.namespace,
        },
        "involvedObject": {
            "apiVersion": names.API_GROUP_VERSION,
            "kind": names.KIND,
            "name": run.meta.name,
            "namespace": run.meta.namespace,
            "uid": run.meta.uid,
        },
        "reason": str(event.reason),
        "message": event.message[:1024],
        "type": "Warning" if event.warning else "Normal",
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
