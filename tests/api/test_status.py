"""The status: values that programs may rely on, and a JSON form that survives a round trip."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

import stagecoach_core.values
from stagecoach_api.outcomes import Cause
from stagecoach_api.status import (
    Artifact,
    Condition,
    ConditionStatus,
    ConditionType,
    Reason,
    Restarts,
    RunState,
    StageState,
    StageStatus,
    Summary,
    TrainingRunStatus,
)

NOW = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)
DIGEST = "0" * 64


def make_status() -> TrainingRunStatus:
    condition = Condition(
        type=ConditionType.ACCEPTED, status=ConditionStatus.TRUE, reason=Reason.VALID, last_transition_time=NOW
    )
    artifact = Artifact(uri=f"s3://m/artifacts/{DIGEST}/output", stage_digest=DIGEST, content_digest=DIGEST)
    stage = StageStatus(name="sft", state=StageState.CACHED, artifact=artifact, cached=True, finished=NOW)
    summary = Summary(state=RunState.PROGRESSING, stage="1/3 sft")
    return TrainingRunStatus(observed_generation=2, conditions=(condition,), stages=(stage,), summary=summary)


def test_a_status_survives_json() -> None:
    status = make_status()
    text = status.model_dump_json(by_alias=True, exclude_none=True)
    assert '"lastTransitionTime":"2026-08-01T12:00:00Z"' in text
    assert TrainingRunStatus.model_validate_json(text) == status


def test_enumeration_values_are_camel_case_and_never_change() -> None:
    """This list is the contract: a value may be added, but none removed or renamed."""
    assert {str(word) for word in ConditionType} == {
        "Accepted", "Planned", "QuotaReserved", "Progressing", "Suspended", "Complete", "Failed",
    }  # fmt: skip
    assert {str(word) for word in Reason} == {
        "Valid", "InvalidSpec", "GraphResolved", "RePlanning", "InputNotFound", "StorageUnreachable", "NoQueue",
        "Admitted", "WaitingForQuota", "Preempted", "StagesRunning", "WaitingForPods", "Retrying", "NothingToDo",
        "SuspendedByUser", "StoppingStages", "NotSuspended", "AllStagesFinished", "StagesUnfinished", "NoFailure",
        "RetriesExhausted", "UserError", "GateMissed", "Diverged", "TimedOut", "SecretMissing", "ImageUnavailable",
        "Cancelled", "ImageNotAllowed", "NotAllowed", "Unschedulable", "JobSetNotInstalled", "CreationRefused",
            "StorageNotAllowed",
    }  # fmt: skip
    for word in [*ConditionType, *Reason, *StageState, *RunState]:
        assert re.fullmatch(r"([A-Z][a-z]+)+", word), word


def test_restarts_are_counted_by_every_cause() -> None:
    assert set(Restarts.model_fields) == {str(cause) for cause in Cause}


def test_the_core_uses_the_same_states() -> None:
    assert stagecoach_core.values.StageState is StageState
    assert stagecoach_core.values.RunState is RunState


def test_times_without_a_time_zone_are_rejected() -> None:
    with pytest.raises(ValidationError, match="timezone"):
        Summary(state=RunState.COMPLETE, eta=datetime(2026, 8, 1))


def test_a_status_has_no_phase() -> None:
    assert "phase" not in TrainingRunStatus.model_fields
