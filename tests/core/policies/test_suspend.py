"""Suspension."""

from __future__ import annotations

from stagecoach_api.outcomes import Cause
from stagecoach_core.policies.suspend import stop_suspended
from stagecoach_core.values import Stop
from tests.core.makers import attempt


def test_an_attempt_of_a_suspended_run_is_stopped_uncharged() -> None:
    assert stop_suspended(attempt("a", "d", 3), suspend=True) == Stop("a", 3, "the run is suspended", Cause.PREEMPTION)


def test_an_attempt_of_any_other_run_is_left_alone() -> None:
    assert stop_suspended(attempt("a", "d", 3), suspend=False) is None
