"""`export`: settings that a release cannot contain are refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from stagecoach_api.kinds.export import ExportStage

MODEL = {"model": {"stage": "sft"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseModel": "org/model"}, "a merged release has no base: remove it, or set `mergeAdapters: false`"),
        ({"mergeAdapters": False, "generation": {"temperature": 1}}, "an adapter has no generation settings"),
    ],
)
def test_settings_that_the_release_cannot_contain_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportStage.model_validate(MODEL | settings)


@pytest.mark.parametrize(
    "settings", [{"mergeAdapters": False, "baseModel": "org/model"}, {"generation": {"temperature": 1}}, {}]
)
def test_settings_of_the_other_form_of_release_are_valid(settings: dict[str, Any]) -> None:
    ExportStage.model_validate(MODEL | settings)
