"""What a status says: tables over the pure parts."""

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
from stagecoach_operator.events import EventReason, event_body, events_between
from stagecoach_operator.history import MAX_ATTEMPTS, forgotten_of, shortened
from stagecoach_operator.observe import Sight, moment
from stagecoach_operator.planning import Snapshot
from stagecoach_operator.progress_reports import Heard, Report
from stagecoach_operator.status import (
    Scene,
    Trouble,
    as_json,
    conditions,
    failure_reason,
    merge_patch,
    milestones,
    without_progress,
    working_status,
)
from stagecoach_operator.waiting import Waiting
from stagecoach_operator.watched import run_view
from tests.core.makers import chain, digests_of, failed, found
from tests.operator.view_makers import DIGEST, NOW, jobset, pod

PLAN = chain("a", "b")
DIGESTS = digests_of(PLAN)
SNAPSHOT = Snapshot(PLAN, Storage(uri="s3://bucket"), "trainer:1", "spec")


def record(number: int = 1, **fields: Any) -> AttemptStatus:
    given = {"digest": DIGESTS["a"], "name": f"r-{number}", "started": moment(NOW - 100), **fields}
    return AttemptStatus(number=number, **given)


def ended(number: int, cause: Cause | None = Cause.INFRASTRUCTURE, **fields: Any) -> Sight:
    return Sight("a", record(number, ended=moment(NOW - 50 + number), cause=cause, **fields), AttemptState.ENDED)


def running(**fields: Any) -> Sight:
    return Sight("a", record(running_since=moment(NOW - 50)), AttemptState.RUNNING, jobset(), (pod(),), **fields)


def scene(*sights: Sight, **fields: Any) -> Scene:
    observed = fields.pop(
        "observed",
        Observed(attempts=tuple(sight.as_attempt(NOW) for sight in sights), suspend=fields.get("suspend", False)),
    )
    given = {"previous": TrainingRunStatus(), "generation": 3, "now": NOW, **fields}
    return Scene(snapshot=SNAPSHOT, decision=decide(PLAN, observed, NOW), sights=sights, **given)


def all_cached() -> Observed:
    """What is observed once the store has every artifact, and has been asked for it."""
    artifacts: dict[str, Found | Missing] = {}
    while True:
        asked = [
            item.digest for item in decide(PLAN, Observed(artifacts=artifacts), NOW).actions if isinstance(item, LookUp)
        ]
        if not asked:
            return Observed(artifacts=artifacts)
        artifacts |= {digest: found(digest, "c" * 64) for digest in asked}


def says(made: Scene, kind: ConditionType) -> tuple[ConditionStatus, Reason, str]:
    found_one = next(item for item in working_status(made).conditions if item.type is kind)
    return found_one.status, found_one.reason, found_one.message


@pytest.mark.parametrize(
    ("made", "kind", "status", "reason", "message"),
    [
        pytest.param(scene(running()), ConditionType.PROGRESSING, "True", Reason.STAGES_RUNNING, "a", id="it runs"),
        pytest.param(
            scene(replace(running(), waiting=Waiting(Reason.UNSCHEDULABLE, "0/4 nodes"), state=AttemptState.STARTING)),
            ConditionType.PROGRESSING,
            "True",
            Reason.UNSCHEDULABLE,
            "0/4 nodes",
            id="no node fits",
        ),
        pytest.param(
            scene(
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
            id="it waits in a queue",
        ),
        pytest.param(
            scene(replace(running(), jobset=jobset(queue="research"))),
            ConditionType.QUOTA_RESERVED,
            "True",
            Reason.ADMITTED,
            "a",
            id="it has its quota",
        ),
        pytest.param(scene(running()), ConditionType.QUOTA_RESERVED, "True", Reason.NO_QUEUE, "", id="it has no queue"),
        pytest.param(
            scene(trouble=Trouble(Reason.JOBSET_NOT_INSTALLED, "install it")),
            ConditionType.PROGRESSING,
            "False",
            Reason.JOBSET_NOT_INSTALLED,
            "install it",
            id="JobSet is missing",
        ),
        pytest.param(
            scene(store_trouble="cannot be reached"),
            ConditionType.PROGRESSING,
            "False",
            Reason.STORAGE_UNREACHABLE,
            "cannot be reached",
            id="the storage is away",
        ),
        pytest.param(
            scene(replace(running(), state=AttemptState.STOPPING), suspend=True),
            ConditionType.SUSPENDED,
            "False",
            Reason.STOPPING_STAGES,
            "`a`",
            id="it is being suspended",
        ),
        pytest.param(
            scene(
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
            id="it is suspended at a step",
        ),
        pytest.param(
            scene(observed=all_cached()),
            ConditionType.COMPLETE,
            "True",
            Reason.ALL_STAGES_FINISHED,
            "2 of them cached",
            id="all is cached",
        ),
    ],
)
def test_conditions_say_why(made: Scene, kind: ConditionType, status: str, reason: Reason, message: str) -> None:
    told = says(made, kind)
    assert (told[0], told[1]) == (status, reason)
    assert message in told[2]


def test_a_stage_that_waits_for_pods_does_not_claim_to_run() -> None:
    waiting = replace(
        running(), waiting=Waiting(Reason.WAITING_FOR_PODS, "1 of 2 pods run"), state=AttemptState.STARTING
    )
    stage = working_status(scene(waiting)).stages[0]
    assert (stage.state, stage.waiting_for) == (StageState.PENDING, "1 of 2 pods run")


def test_progress_and_its_end_are_shown() -> None:
    report = Report(pod_uid="x", time=NOW, activity="train", done=30, total=120, unit="tokens", remaining_seconds=60)
    status = working_status(scene(running(heard=Heard(report))))
    assert status.summary is not None
    assert (status.summary.stage, status.summary.progress) == ("0/2 a", "25 %")
    assert status.summary.eta == moment(NOW + 60)
    foreign = Report(pod_uid="x", time=NOW, percentage=42)
    shown = working_status(scene(running(heard=Heard(foreign)))).summary
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
def test_a_failure_has_one_word(fields: dict[str, Any], reason: Reason) -> None:
    stage = StageStatus(name="a", state=StageState.FAILED, attempts=(record(ended=moment(NOW), **fields),))
    assert failure_reason(stage) is reason


def test_the_time_of_a_condition_changes_only_with_its_status() -> None:
    first = conditions(
        {ConditionType.FAILED: (ConditionStatus.FALSE, Reason.NO_FAILURE, "")}, TrainingRunStatus(), 1, NOW
    )
    before = TrainingRunStatus(conditions=first)
    again = conditions({ConditionType.FAILED: (ConditionStatus.FALSE, Reason.NO_FAILURE, "x")}, before, 2, NOW + 9)
    assert again[0].last_transition_time == moment(NOW)
    turned = conditions({ConditionType.FAILED: (ConditionStatus.TRUE, Reason.USER_ERROR, "")}, before, 2, NOW + 9)
    assert turned[0].last_transition_time == moment(NOW + 9)


# -- history -----------------------------------------------------------------------------------------------------------


def test_only_the_newest_attempts_are_kept_and_the_rest_is_counted() -> None:
    sights = [ended(number) for number in range(1, 12)]
    kept, forgotten = shortened(sights, None, NOW)
    assert [item.number for item in kept] == list(range(12 - MAX_ATTEMPTS, 12))
    assert forgotten is not None
    assert (forgotten.infrastructure, forgotten.until) == (3, sights[2].record.ended)
    previous = StageStatus(name="a", state=StageState.RETRYING, forgotten=forgotten)
    _, more = shortened([ended(number) for number in range(4, 13)], previous, NOW)
    assert more is not None
    assert more.infrastructure == 4
    told = forgotten_of(TrainingRunStatus(stages=(previous.model_copy(update={"forgotten": more}),)))
    assert told["a", DIGESTS["a"]].counts[Cause.INFRASTRUCTURE] == 4


def test_what_worked_on_other_work_is_not_counted_with_it() -> None:
    before = ForgottenAttempts(digest=DIGEST, until=moment(NOW - 500), infrastructure=7)
    previous = StageStatus(name="a", state=StageState.RETRYING, forgotten=before)
    _, forgotten = shortened([ended(number) for number in range(1, 10)], previous, NOW)
    assert forgotten is not None
    assert (forgotten.digest, forgotten.infrastructure) == (DIGESTS["a"], 1)


def test_a_living_attempt_is_always_kept() -> None:
    sights = [running(), *(ended(number) for number in range(2, 11))]
    kept, _ = shortened(sights, None, NOW)
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
def test_a_patch_makes_one_of_the_other(before: Any, after: Any, patch: Any) -> None:
    from tests.operator.makers import merged

    assert merge_patch(before, after) == patch
    assert merged(before, patch) == after


def test_progress_alone_is_no_milestone() -> None:
    report = Report(pod_uid="x", time=NOW, done=1, total=10)
    one = working_status(scene(running(heard=Heard(report))))
    other = working_status(scene(running(heard=Heard(replace(report, done=5)))))
    assert as_json(one) != as_json(other)
    assert without_progress(as_json(one)) == without_progress(as_json(other))
    assert milestones(one) == milestones(other)
    assert milestones(one) != milestones(working_status(scene(ended(1))))


def test_events_tell_what_is_new() -> None:
    before = working_status(scene(running()))
    after = working_status(scene(ended(1, message="killed"), previous=before))
    events = events_between(before, after)
    assert [event.reason for event in events] == [EventReason.ATTEMPT_FAILED]
    assert "killed" in events[0].message
    assert events_between(after, after) == []


def test_the_same_event_has_the_same_name() -> None:
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
