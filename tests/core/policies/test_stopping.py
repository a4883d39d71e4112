"""Reasons to stop a live attempt."""

from __future__ import annotations

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_core.policies.stopping import (
    stop_cancelled,
    stop_duplicate,
    stop_removed,
    stop_superseded,
    stop_suspended,
    stop_unselected,
)
from stagecoach_core.values import Stop
from tests.core.makers import attempt


def test_an_attempt_of_a_cancelled_run_is_stopped_uncharged() -> None:
    assert stop_cancelled(attempt("a", "d", 3), cancel=True) == Stop("a", 3, "the run is cancelled", Cause.PREEMPTION)


def test_an_attempt_of_a_run_that_is_not_cancelled_is_left_alone() -> None:
    assert stop_cancelled(attempt("a", "d", 3), cancel=False) is None


def test_an_attempt_of_a_suspended_run_is_stopped_uncharged() -> None:
    assert stop_suspended(attempt("a", "d", 3), suspend=True) == Stop("a", 3, "the run is suspended", Cause.PREEMPTION)


def test_an_attempt_of_a_run_that_is_not_suspended_is_left_alone() -> None:
    assert stop_suspended(attempt("a", "d", 3), suspend=False) is None


def test_only_attempts_of_unselected_stages_are_stopped() -> None:
    assert stop_unselected(attempt("a", "d"), None) is None
    assert stop_unselected(attempt("a", "d"), frozenset({"a"})) is None
    stop = stop_unselected(attempt("b", "d"), frozenset({"a"}))
    assert stop is not None
    assert stop.reason == "the stage is not selected"


@pytest.mark.parametrize(
    ("digest", "inputs_change", "reason"),
    [
        pytest.param("d", False, None, id="the stage still asks for this work"),
        pytest.param("e", False, "the stage's settings or inputs have changed", id="another digest"),
        pytest.param(None, True, "an input is being re-created", id="an input is being re-created"),
        pytest.param(None, False, None, id="the store has not answered yet"),
    ],
)
def test_an_attempt_at_a_superseded_digest_is_stopped(
    digest: str | None, inputs_change: bool, reason: str | None
) -> None:
    stop = stop_superseded(attempt("a", "d"), digest, inputs_change)
    assert (stop and stop.reason) == reason


def test_of_two_live_attempts_the_older_is_stopped() -> None:
    older = stop_duplicate(attempt("a", "d", 1), newest=2)
    assert older is not None
    assert (older.number, older.cause) == (1, Cause.PREEMPTION)
    assert stop_duplicate(attempt("a", "d", 2), newest=2) is None


def test_an_attempt_of_a_removed_stage_is_stopped() -> None:
    assert stop_removed(attempt("gone", "d")).reason == "the run no longer has this stage"
