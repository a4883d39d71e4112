"""The reference: every field is described where it is defined, and the page has all descriptions."""

from __future__ import annotations

import re

import pytest

from stagecoach_api.base import Model
from stagecoach_api.fields import fields_of, shape_of, walk_models
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.schema.reference import reference_page
from stagecoach_api.spec import TrainingRun
from stagecoach_api.status import Reason, TrainingRunStatus
from tests import ROOT

MODELS = list(walk_models(TrainingRun, TrainingRunStatus))
STATUS_MODELS = list(walk_models(TrainingRunStatus))
FIELDS = [(model, name) for model in MODELS for name in fields_of(model)]
PAGE = reference_page()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_described_and_states_what_unset_or_null_means(model: type[Model]) -> None:
    assert model.__doc__
    for name, field in fields_of(model).items():
        description = " ".join((field.description or "").split())
        assert description, f"{name} has no docstring"
        assert "None" not in description, f"{name}: users do not know Python's None"
        assert "Default:" not in description, f"{name}: defaults are generated"
        if shape_of(field.annotation).optional:
            wanted = "If unset:" if field.default is None else "Set to null"
            assert wanted in description, f"{name} does not state what happens without a value"
        else:
            assert "If unset:" not in description, f"{name} cannot be unset"


def test_every_model_and_field_is_on_the_page_once() -> None:
    assert sorted(SECTIONS) == sorted(model.__name__ for model in MODELS)
    for model, name in FIELDS:
        rows = [line for line in SECTIONS[model.__name__].splitlines() if line.startswith(f"| `{name}` |")]
        assert len(rows) == 1, f"{model.__name__}.{name}"


def test_every_kind_of_stage_has_a_heading_linked_in_the_contents() -> None:
    for kind in STAGE_KINDS:
        assert f"## Stage kind `{kind}`" in PAGE
        assert f"(#stage-kind-{kind.lower()})" in PAGE


def test_every_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in PAGE.splitlines()
        if line.startswith("#")
    }
    links = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert links
    assert links <= headings
    for target in re.findall(r"\]\((?!#)([^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file()


@pytest.mark.parametrize(
    "row",
    [
        "| `learningRate` | number, 0 to 10 | **required** |",
        "| `sequenceLength` | integer, 8 to 16,777,216 | `1024` |",
        "| `seed` | integer, 0 to 4,294,967,295 | `0` |",
        "| `name` | `cosine` · `linear` · `constant` · `wsd` | `cosine` |",
        "| `data` | list, 1 to 64, of [WeightedSource](#weightedsource) | **required** |",
        "| `budget` | [Budget](#budget) | `{epochs: 1}` |",
        "| `started` | time (RFC 3339) |  |",
    ],
)
def test_rows_give_type_range_and_default(row: str) -> None:
    assert row in PAGE


def test_tables_have_the_same_number_of_cells_in_every_row() -> None:
    for line in PAGE.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_every_reason_of_a_condition_is_listed() -> None:
    assert [reason for reason in Reason if f"`{reason}`" not in PAGE] == []
