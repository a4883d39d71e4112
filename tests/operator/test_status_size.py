"""The status of a run fits, whatever its attempts and texts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Storage
from stagecoach_api.status import AttemptStatus, Incarnation, TrainingRunStatus, WaitStatus
from stagecoach_core.decide import decide
from stagecoach_core.values import AttemptState, Missing, Observed
from stagecoach_operator.attempt_history import MAX_ATTEMPTS, forgotten_of, records_of
from stagecoach_operator.attempt_times import moment
from stagecoach_operator.observe import ObservedAttempt
from stagecoach_operator.planning import FrozenPlan
from stagecoach_operator.status import StatusInputs, working_status
from stagecoach_operator.status_size import MAX_BYTES, num_bytes
from tests.core.makers import data_stage, digests_of, plan_for
from tests.operator.view_makers import NOW

NAMES = [f"{number:02d}-{'x' * 60}" for number in range(64)]
PLAN = plan_for(*(data_stage(name) for name in NAMES), onFailure="continue")
DIGESTS = digests_of(PLAN)
FROZEN = FrozenPlan(PLAN, Storage(uri="s3://bucket"), "trainer:1", "spec")


def wordy(name: str, number: int, character: str) -> ObservedAttempt:
    """A failed attempt with every text as long as its field allows."""
    pods = tuple(Incarnation(pod_uid="u" * 64, pod="p" * 253, node="n" * 253, started=moment(NOW)) for _ in range(4))
    record = AttemptStatus(
        number=number,
        digest=DIGESTS[name],
        name="r" * 63,
        started=moment(NOW - 100),
        running_since=moment(NOW - 90),
        ended=moment(NOW - 80 + number),
        cause=Cause.INFRASTRUCTURE,
        stop_cause=Cause.INFRASTRUCTURE,
        stopping=character * 512,
        message=character * 1024,
        fault=character * 256,
        warnings=(character * 256,) * 8,
        pod="p" * 253,
        node="n" * 253,
        exit_code=-256,
        last_step=10**15,
        incarnations=pods,
        waits=tuple(WaitStatus(reason="W" * 64, since=moment(NOW)) for _ in range(8)),
    )
    return ObservedAttempt(name, record, AttemptState.ENDED)


def status_of(attempts: list[ObservedAttempt], **given_: Any) -> TrainingRunStatus:
    observed = Observed(
        attempts=tuple(item.as_core_attempt(NOW) for item in attempts),
        artifacts={digest: Missing(NOW) for digest in DIGESTS.values()},
        forgotten=forgotten_of(given_.get("previous", TrainingRunStatus())),
    )
    fields = {"previous": TrainingRunStatus(), "generation": 1, "now": NOW, **given_}
    return working_status(StatusInputs(FROZEN, decide(PLAN, observed, NOW), attempts, **fields))


@pytest.mark.parametrize(
    "character", ["a", "训", "🚂", '"', "\n"], ids=["ascii", "chinese", "emoji", "quote", "line end"]
)
def test_64_stages_of_8_attempts_with_the_longest_texts_fit(character: str) -> None:
    attempts = [wordy(name, number, character) for name in NAMES for number in range(1, MAX_ATTEMPTS + 1)]
    avoided = dict.fromkeys(NAMES, ("n" * 300,) * 16)
    status = status_of(attempts, avoided=avoided, store_error=character * 5000, unheard=character * 5000)
    assert num_bytes(status) <= MAX_BYTES
    assert [stage.attempts[-1].number for stage in status.stages] == [MAX_ATTEMPTS] * len(NAMES)
    assert all(stage.attempts[-1].message for stage in status.stages)


@settings(max_examples=5)
@given(st.integers(1, 64), st.integers(1, MAX_ATTEMPTS), st.sampled_from(["a", "训", "🚂"]))
def test_attempts_that_are_not_listed_are_counted_so_that_budgets_stay_the_same(
    stages: int, number: int, character: str
) -> None:
    attempts = [wordy(name, n, character) for name in NAMES[:stages] for n in range(1, number + 1)]
    status = status_of(attempts)
    listed = [ObservedAttempt(key[0], record, AttemptState.ENDED) for key, record in records_of(status).items()]
    again = status_of(listed, previous=status)
    assert num_bytes(again) <= MAX_BYTES
    assert [stage.restarts for stage in again.stages] == [stage.restarts for stage in status.stages]
    assert [stage.restarts.infrastructure for stage in status.stages[:stages]] == [number] * stages


def test_a_status_that_fits_keeps_every_text() -> None:
    status = status_of([wordy(NAMES[0], number, "a") for number in range(1, MAX_ATTEMPTS + 1)])
    assert [len(item.message) for item in status.stages[0].attempts] == [1024] * MAX_ATTEMPTS
