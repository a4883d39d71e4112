"""Cancellation."""

from __future__ import annotations

from stagecoach_api.outcomes import Cause
from stagecoach_core.policies.cancel import stop_cancelled
from stagecoach_core.values import Stop
from tests.core.makers import attempt


def test_an_attempt_of_a_cancelled_run_is_stopped_uncharged() -> None:
    assert stop_cancelled(attempt("a", "d", 3), cancel=True) == Stop("a", 3, "the run is cancelled", Cause.PREEMPTION)


def test_an_attempt_of_any_other_run_is_left_alone() -> None:
    assert stop_cancelled(attempt("a", "d", 3), cancel=False) is None
