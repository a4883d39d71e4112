"""Deadlines of attempts that do not run yet."""

from __future__ import annotations

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Deadlines
from stagecoach_core.policies.waiting import DEFAULT_DEADLINES, seconds_allowed, stop_waiting, wait_ends
from stagecoach_core.values import AttemptState, Wait, WaitKind
from tests.core.makers import attempt

DAY = 86_400.0


@pytest.mark.parametrize(
    ("kind", "default", "cause"),
    [
        (WaitKind.QUOTA, 7 * DAY, Cause.USER),
        (WaitKind.SCHEDULING, DAY, Cause.USER),
        (WaitKind.IMAGE, 300.0, Cause.INFRASTRUCTURE),
        (WaitKind.PODS, 1800.0, Cause.INFRASTRUCTURE),
    ],
)
def test_every_wait_has_a_deadline_and_a_cause(kind: WaitKind, default: float, cause: Cause) -> None:
    waiting = attempt("a", "d", state=AttemptState.STARTING, wait=Wait(kind, 100.0, "Reason", "a message"))
    assert wait_ends(waiting, Deadlines()) == 100.0 + default
    assert stop_waiting(waiting, Deadlines(), 99.0 + default) is None
    stop = stop_waiting(waiting, Deadlines(), 100.0 + default)
    assert stop is not None
    assert (stop.cause, stop.fault) == (cause, "waiting: Reason")
    assert stop.reason.endswith("Seconds` (" + f"{default:.0f}): a message")
    assert stop_waiting(waiting, DEFAULT_DEADLINES, 99.0 + default) is None


def test_a_deadline_that_is_set_counts() -> None:
    assert seconds_allowed(WaitKind.IMAGE, Deadlines(image_seconds=7)) == 7


def test_an_attempt_that_runs_or_stops_is_not_waiting() -> None:
    for state in (AttemptState.RUNNING, AttemptState.STOPPING):
        assert stop_waiting(attempt("a", "d", state=state, wait=Wait(WaitKind.IMAGE, 0.0)), Deadlines(), 1e9) is None
