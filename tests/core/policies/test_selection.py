"""`--until` and `--from`."""

from __future__ import annotations

import pytest

from stagecoach_core.policies.selection import UnknownStage, starting_from, stop_unselected, until
from tests.core.makers import attempt, data_stage, plan_for

PLAN = plan_for(data_stage("corpus"), data_stage("words", "corpus"), data_stage("model", "words"), data_stage("other"))


def test_until_takes_a_stage_and_all_it_needs() -> None:
    assert until(PLAN, "words") == {"corpus", "words"}
    assert until(PLAN, "model") == {"corpus", "words", "model"}


def test_from_forces_one_stage() -> None:
    assert starting_from(PLAN, "words") == {"words"}


def test_an_unknown_stage_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownStage, match="run `demo` has no stage `corpsu`; did you mean `corpus`"):
        until(PLAN, "corpsu")
    with pytest.raises(UnknownStage, match="it has `corpus`, `words`, `model`, `other`"):
        starting_from(PLAN, "zzz")


def test_only_attempts_of_other_stages_are_stopped() -> None:
    assert stop_unselected(attempt("a", "d"), None) is None
    assert stop_unselected(attempt("a", "d"), frozenset({"a"})) is None
    stop = stop_unselected(attempt("b", "d"), frozenset({"a"}))
    assert stop is not None
    assert stop.reason == "the stage is not selected"
