"""Attempts that a change of the run has left behind."""

from __future__ import annotations

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_core.policies.replan import stop_removed, stop_second, stop_superseded
from tests.core.makers import attempt


@pytest.mark.parametrize(
    ("digest", "inputs_change", "reason"),
    [
        pytest.param("d", False, None, id="the stage still asks for this work"),
        pytest.param("e", False, "the stage's settings or inputs have changed", id="another digest"),
        pytest.param(None, True, "an input is made anew", id="an input is made anew"),
        pytest.param(None, False, None, id="the store has not answered yet"),
    ],
)
def test_superseded(digest: str | None, inputs_change: bool, reason: str | None) -> None:
    stop = stop_superseded(attempt("a", "d"), digest, inputs_change)
    assert (stop and stop.reason) == reason


def test_of_two_living_attempts_the_older_is_stopped() -> None:
    older = stop_second(attempt("a", "d", 1), newest=2)
    assert older is not None
    assert (older.number, older.cause) == (1, Cause.PREEMPTION)
    assert stop_second(attempt("a", "d", 2), newest=2) is None


def test_an_attempt_of_a_removed_stage_is_stopped() -> None:
    assert stop_removed(attempt("gone", "d")).reason == "the run no longer has this stage"
