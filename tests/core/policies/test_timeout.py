"""Time-outs and hangs."""

from __future__ import annotations

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_core.policies.timeout import HangLimits, deadline, stop_overdue
from stagecoach_core.values import Attempt, AttemptState
from tests.core.makers import attempt

BEATING = attempt("a", "d", started=0.0, running_since=100.0, heartbeat=1000.0)


@pytest.mark.parametrize(
    ("case", "timeout", "moment", "cause"),
    [
        pytest.param(BEATING, None, 1600.0, Cause.HANG, id="ten minutes without a heartbeat are a hang"),
        pytest.param(BEATING, 1200, 1300.0, Cause.USER, id="a time-out counts from the start of the first process"),
        pytest.param(BEATING, 9999, 1600.0, Cause.HANG, id="a hang does not wait for the time-out"),
        pytest.param(
            attempt("a", "d", heartbeat=1000.0, longest_silence=500.0), None, 2500.0, Cause.HANG, id="the limit adapts"
        ),
        pytest.param(
            attempt("a", "d", running_since=100.0), None, 1900.0, Cause.HANG, id="half an hour for the first heartbeat"
        ),
    ],
)
def test_is_stopped_at_the_deadline_and_not_before(
    case: Attempt, timeout: int | None, moment: float, cause: Cause
) -> None:
    assert deadline(case, timeout) == moment
    assert stop_overdue(case, timeout, moment - 0.001) is None
    stop = stop_overdue(case, timeout, moment)
    assert stop is not None
    assert stop.cause is cause


@pytest.mark.parametrize("state", [AttemptState.STARTING, AttemptState.STOPPING, AttemptState.ENDED])
def test_only_a_running_attempt_can_be_overdue(state: AttemptState) -> None:
    case = attempt("a", "d", state=state)
    assert stop_overdue(case, 1, 1e9) is None
    assert deadline(case, 1) is None


def test_the_reason_has_the_figures() -> None:
    hang = stop_overdue(BEATING, None, 1700.0)
    late = stop_overdue(BEATING, 5, 1001.0)
    assert hang is not None
    assert late is not None
    assert hang.reason == "no heartbeat for 700 s; the limit is 600 s"
    assert late.reason == "it ran longer than `timeoutSeconds` (5) allows"


def test_limits_can_be_set() -> None:
    assert deadline(BEATING, None, HangLimits(shortest_seconds=1.0)) == 1001.0
