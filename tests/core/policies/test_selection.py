"""`--until` and `--from`."""

from __future__ import annotations

import pytest

from stagecoach_core.policies.selection import UnknownStage, starting_from, until
from tests.core.makers import data_stage, plan_for

PLAN = plan_for(data_stage("corpus"), data_stage("words", "corpus"), data_stage("model", "words"), data_stage("other"))


def test_until_selects_a_stage_and_all_it_needs() -> None:
    assert until(PLAN, "words") == {"corpus", "words"}
    assert until(PLAN, "model") == {"corpus", "words", "model"}


def test_from_forces_one_stage() -> None:
    assert starting_from(PLAN, "words") == {"words"}


def test_an_unknown_stage_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(UnknownStage, match="run `demo` has no stage `corpsu`; did you mean `corpus`"):
        until(PLAN, "corpsu")
    with pytest.raises(UnknownStage, match="it has `corpus`, `words`, `model`, `other`"):
        starting_from(PLAN, "zzz")
