"""The status computed from observed attempts and the core's decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Storage
from stagecoach_api.status import (
    AttemptStatus,
    Condition,
    ConditionStatus,
    ConditionType,
    ForgottenAttempts,
    Reason,
    StageState,
    StageStatus,
    TrainingRunStatus,
)
from stagecoach_core.decide import decide
from stagecoach_core.values import AttemptState, Found, LookUp, Missing, Observed
from stagecoach_operator.attempt_client import Blocker
from stagecoach_operator.attempt_history import MAX_ATTEMPTS, bounded, forgotten_of
from stagecoach_operator.attempt_times import moment
from stagecoach_operator.events import EventReason, event_body, events_between
from stagecoach_operator.object_views import run_view
from stagecoach_operator.observe import ObservedAttempt
from stagecoach_operator.planning import FrozenPlan
from stagecoach_operator.pod_startup import Waiting
from stagecoach_operator.progress_reports import LatestReport, ProgressReport
from stagecoach_operator.status import (
    StatusInputs,
    as_json,
    conditions,
    failure_reason,
    merge_patch,
    milestones,
    without_progress,
    working_status,
)
from tests.core.makers import chain, digests_of, failed, found
from tests.operator.view_makers import DIGEST, NOW, jobset, pod

PLAN = chain("a", "b")
DIGESTS = digests_of(PLAN)
FROZEN = FrozenPlan(PLAN, Storage(uri="s3://bucket"), "trainer:1", "spec")


def record(number: int = 1, **fields: Any) -> AttemptStatus:
    given = {"digest": DIGESTS["a"], "name": f"r-{number}", "started": moment(NOW - 100), **fields}
    return AttemptStatus(number=number, **given)


def ended(number: int, cause: Cause | None = Cause.INFRASTRUCTURE, **fields: Any) -> ObservedAttempt:
    return ObservedAttempt(
        "a", record(number, ended=moment(NOW - 50 + number), cause=cause, **fields), AttemptState.ENDED
    )


def running(**fields: Any) -> ObservedAttempt:
    return ObservedAttempt(
        "a", record(running_since=moment(NOW - 50)), AttemptState.RUNNING, jobset(), (pod(),), **fields
    )


def inputs(*attempts: ObservedAttempt, **fields: Any) -> StatusInputs:
    observed = fields.pop(
        "observed",
        Observed(
            attempts=tuple(attempt.as_core_attempt(NOW) for attempt in attempts), suspend=fields.get("suspend", False)
        ),
    )
    given = {"previous": TrainingRunStatus(), "generation": 3, "now": NOW, **fields}
    return StatusInputs(frozen=FROZEN, decision=decide(PLAN, observed, NOW), attempts=attempts, **given)


def all_cached() -> Observed:
    """Return the observation after all artifacts have been looked up and found in the store."""
    artifacts: dict[str, Found | Missing] = {}
    while True:
        wanted = [
            item.digest for item in decide(PLAN, Observed(artifacts=artifacts), NOW).actions if isinstance(item, LookUp)
        ]
        if not wanted:
            return Observed(artifacts=artifacts)
        artifacts |= {digest: found(digest, "c" * 64) for digest in wanted}


def condition_of(made: StatusInputs, kind: ConditionType) -> tuple[ConditionStatus, Reason, str]:
    condition = next(item for item in working_status(made).conditions if item.type is kind)
    return condition.status, condition.reason, condition.message


@pytest.mark.parametrize(
    ("made", "kind", "status", "reason", "message"),
    [
        pytest.param(inputs(running()), ConditionType.PROGRESSING, "True", Reason.STAGES_RUNNING, "a", id="running"),
        pytest.param(
            inputs(replace(running(), waiting=Waiting(Reason.UNSCHEDULABLE, "0/4 nodes"), state=AttemptState.STARTING)),
            ConditionType.PROGRESSING,
            "True",
            Reason.UNSCHEDULABLE,
            "0/4 nodes",
            id="no node fits",
        ),
        pytest.param(
            inputs(
                replace(
                    running(),
                    jobset=jobset(queue="research"),
                    waiting=Waiting(Reason.WAITING_FOR_QUOTA, "couldn't assign flavors"),
                    state=AttemptState.STARTING,
                )
            ),
            ConditionType.QUOTA_RESERVED,
            "False",
            Reason.WAITING_FOR_QUOTA,
            "couldn't assign flavors",
            id="waiting in a queue",
        ),
        pytest.param(
            inputs(replace(running(), jobset=jobset(queue="research"))),
            ConditionType.QUOTA_RESERVED,
            "True",
            Reason.ADMITTED,
            "a",
            id="quota reserved",
        ),
        pytest.param(
            inputs(running()), ConditionType.QUOTA_RESERVED, "True", Reason.NO_QUEUE, "", id="it has no queue"
        ),
        pytest.param(
            inputs(blocker=Blocker(Reason.JOBSET_NOT_INSTALLED, "install it")),
            ConditionType.PROGRESSING,
            "False",
            Reason.JOBSET_NOT_INSTALLED,
            "install it",
            id="JobSet is not installed",
        ),
        pytest.param(
            inputs(store_error="cannot be reached"),
            ConditionType.PROGRESSING,
            "False",
            Reason.STORAGE_UNREACHABLE,
            "cannot be reached",
            id="storage unavailable",
        ),
        pytest.param(
            inputs(replace(running(), state=AttemptState.STOPPING), suspend=True),
            ConditionType.SUSPENDED,
            "False",
            Reason.STOPPING_STAGES,
            "`a`",
            id="being suspended",
        ),
        pytest.param(
            inputs(
                ended(1, Cause.PREEMPTION, last_step=120),
                observed=Observed(
                    attempts=(failed("a", DIGESTS["a"], cause=Cause.PREEMPTION),),
                    artifacts={},
                    suspend=True,
                ),
                suspend=True,
            ),
            ConditionType.SUSPENDED,
            "True",
            Reason.SUSPENDED_BY_USER,
            "step 120",
            id="suspended at a step",
        ),
        pytest.param(
            inputs(observed=all_cached()),
            ConditionType.COMPLETE,
            "True",
            Reason.ALL_STAGES_FINISHED,
            "2 of them cached",
            id="all stages cached",
        ),
    ],
)
def test_conditions_have_reasons(
    made: StatusInputs, kind: ConditionType, status: str, reason: Reason, message: str
) -> None:
    actual = condition_of(made, kind)
    assert (actual[0], actual[1]) == (status, reason)
    assert message in actual[2]


def test_a_stage_waiting_for_pods_is_pending() -> None:
    waiting = replace(
        running(), waiting=Waiting(Reason.WAITING_FOR_PODS, "1 of 2 pods run"), state=AttemptState.STARTING
    )
    stage = working_status(inputs(waiting)).stages[0]
    assert (stage.state, stage.waiting_for) == (StageState.PENDING, "1 of 2 pods run")


def test_progress_and_its_eta_are_reported() -> None:
    report = ProgressReport(
        pod_uid="x", time=NOW, activity="train", done=30, total=120, unit="tokens", remaining_seconds=60
    )
    status = working_status(inputs(running(latest_report=LatestReport(report))))
    assert status.summary is not None
    assert (status.summary.stage, status.summary.progress) == ("0/2 a", "25 %")
    assert status.summary.eta == moment(NOW + 60)
    foreign = ProgressReport(pod_uid="x", time=NOW, percentage=42)
    shown = working_status(inputs(running(latest_report=LatestReport(foreign)))).summary
    assert shown is not None
    assert shown.progress == "42 %"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cause": Cause.USER, "exit_code": 64}, Reason.USER_ERROR),
        ({"cause": Cause.USER, "exit_code": 65}, Reason.GATE_MISSED),
        ({"cause": Cause.USER, "exit_code": 66}, Reason.DIVERGED),
        ({"cause": Cause.USER, "exit_code": 75, "stop_cause": Cause.USER}, Reason.TIMED_OUT),
        ({"cause": Cause.INFRASTRUCTURE, "exit_code": -9}, Reason.RETRIES_EXHAUSTED),
        ({"cause": Cause.HANG}, Reason.RETRIES_EXHAUSTED),
    ],
)
def test_a_permanent_failure_has_a_reason(fields: dict[str, Any], reason: Reason) -> None:
    stage = StageStatus(name="a", state=StageState.FAILED, attempts=(record(ended=moment(NOW), **fields),))
    assert failure_reason(stage) is reason


def test_a_transition_time_changes_only_with_the_status() -> None:
    first = conditions(
        {ConditionType.FAILED: (ConditionStatus.FALSE, Reason.NO_FAILURE, "")}, TrainingRunStatus(), 1, NOW
    )
    before = TrainingRunStatus(conditions=first)
    again = conditions({ConditionType.FAILED: (ConditionStatus.FALSE, Reason.NO_FAILURE, "x")}, before, 2, NOW + 9)
    assert again[0].last_transition_time == moment(NOW)
    turned = conditions({ConditionType.FAILED: (ConditionStatus.TRUE, Reason.USER_ERROR, "")}, before, 2, NOW + 9)
    assert turned[0].last_transition_time == moment(NOW + 9)


# -- history -----------------------------------------------------------------------------------------------------------


def test_recent_attempts_are_kept_and_older_ones_counted() -> None:
    attempts = [ended(number) for number in range(1, 12)]
    kept, forgotten = bounded(attempts, None, NOW)
    assert [item.number for item in kept] == list(range(12 - MAX_ATTEMPTS, 12))
    assert forgotten is not None
    assert (forgotten.infrastructure, forgotten.until) == (3, attempts[2].record.ended)
    previous = StageStatus(name="a", state=StageState.RETRYING, forgotten=forgotten)
    _, more = bounded([ended(number) for number in range(4, 13)], forgotten, NOW)
    assert more is not None
    assert more.infrastructure == 4
    restored = forgotten_of(TrainingRunStatus(stages=(previous.model_copy(update={"forgotten": more}),)))
    assert [group.counts[Cause.INFRASTRUCTURE] for group in restored["a", DIGESTS["a"]]] == [1] * 4


def test_warnings_are_kept_of_the_newest_attempt_only() -> None:
    attempts = [ended(1, warnings=("rows are not packed",)), ended(2, warnings=("rows are not packed",))]
    kept, _ = bounded(attempts, None, NOW)
    assert [item.warnings for item in kept] == [(), ("rows are not packed",)]


def test_attempts_at_another_digest_are_not_counted_together() -> None:
    before = ForgottenAttempts(digest=DIGEST, until=moment(NOW - 500), infrastructure=7)
    _, forgotten = bounded([ended(number) for number in range(1, 10)], before, NOW)
    assert forgotten is not None
    assert (forgotten.digest, forgotten.infrastructure) == (DIGESTS["a"], 1)


def test_a_live_attempt_is_always_kept() -> None:
    attempts = [running(), *(ended(number) for number in range(2, 11))]
    kept, _ = bounded(attempts, None, NOW)
    assert kept[-1].number == 10
    assert len(kept) <= MAX_ATTEMPTS


# -- patches and events ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "patch"),
    [
        ({}, {"a": 1}, {"a": 1}),
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1, "b": 2}, {"a": 1}, {"b": None}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a": {"c": None}}),
        ({"a": [1]}, {"a": [1, 2]}, {"a": [1, 2]}),
    ],
)
def test_a_merge_patch_turns_one_status_into_the_other(before: Any, after: Any, patch: Any) -> None:
    from tests.operator.makers import merged

    assert merge_patch(before, after) == patch
    assert merged(before, patch) == after


def test_progress_alone_is_not_a_milestone() -> None:
    report = ProgressReport(pod_uid="x", time=NOW, done=1, total=10)
    one = working_status(inputs(running(latest_report=LatestReport(report))))
    other = working_status(inputs(running(latest_report=LatestReport(replace(report, done=5)))))
    assert as_json(one) != as_json(other)
    assert without_progress(as_json(one)) == without_progress(as_json(other))
    assert milestones(one) == milestones(other)
    assert milestones(one) != milestones(working_status(inputs(ended(1))))


def test_events_are_posted_for_changes_only() -> None:
    before = working_status(inputs(running()))
    after = working_status(inputs(ended(1, message="killed"), previous=before))
    events = events_between(before, after)
    assert [event.reason for event in events] == [EventReason.ATTEMPT_FAILED]
    assert "killed" in events[0].message
    assert events_between(after, after) == []


def test_a_repeated_event_has_the_same_name() -> None:
    run = run_view({"metadata": {"name": "demo", "namespace": "team", "uid": "u", "generation": 1}})
    refused = Condition(
        type=ConditionType.ACCEPTED,
        status=ConditionStatus.FALSE,
        reason=Reason.INVALID_SPEC,
        message="bad",
        last_transition_time=moment(NOW),
    )
    (event,) = events_between(TrainingRunStatus(), TrainingRunStatus(conditions=(refused,)))
    first, later = event_body(run, event, NOW), event_body(run, event, NOW + 60)
    assert first["metadata"]["name"] == later["metadata"]["name"]
    assert (first["type"], first["reason"]) == ("Warning", "Refused")
