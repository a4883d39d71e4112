"""The models of the contract: closed, frozen, camelCase outside, free of client libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

import stagecoach_api
from stagecoach_api.fields import fields_of, model_at, shape_of, walk_models
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.kinds.sft import SftStage
from stagecoach_api.reading.validation import validate
from stagecoach_api.spec import Stage, TrainingRun
from tests.api.makers import document, edited

HEAVY = ("torch", "transformers", "boto3", "botocore", "kopf", "kubernetes", "click", "rich", "jinja2", "numpy")


def stage(name: str) -> Stage:
    return next(item for item in validate(document()).spec.stages if item.name == name)


def test_a_run_survives_json() -> None:
    run = validate(document())
    assert TrainingRun.model_validate_json(run.model_dump_json(by_alias=True)) == run


def test_models_are_frozen() -> None:
    run = validate(document())
    with pytest.raises(ValidationError, match="frozen"):
        run.spec.seed = 1  # type: ignore[misc]


def test_a_stage_lists_its_inputs_with_their_paths() -> None:
    found = {path: reference.key for path, reference in stage("pretrain").references()}
    assert found == {
        ("pretrain", "tokenizer"): "stage:vocabulary",
        ("pretrain", "data", 0): "stage:corpus",
        ("pretrain", "heldOut", "sets", 0): "stage:corpus",
    }
    assert {reference.key for _, reference in stage("score").references()} == {
        "stage:sft", "stage:corpus", "uri:verse.json",
    }  # fmt: skip


def test_a_stage_waits_for_its_inputs_and_for_what_it_names_in_after() -> None:
    assert stage("pretrain").upstream() == {"vocabulary", "corpus"}
    assert stage("release").upstream() == {"sft", "score"}


def test_a_stage_is_exactly_one_kind() -> None:
    for item in validate(document()).spec.stages:
        assert type(item.config) is STAGE_KINDS[item.kind].config


def test_names_of_fields_are_camel_case_and_no_word_that_yaml_reads_otherwise() -> None:
    for model in walk_models(TrainingRun):
        for name in fields_of(model):
            assert name.isalnum(), name
            assert name[0].islower(), name
            assert name.lower() not in {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}, name


def test_models_have_different_names_as_schemas_need() -> None:
    names = [model.__name__ for model in walk_models(TrainingRun)]
    assert len(names) == len(set(names))


def test_a_path_leads_to_its_model() -> None:
    assert model_at(TrainingRun, ("spec", "stages", 3, "sft", "data", 0, "fields")) is not None
    assert model_at(TrainingRun, ("spec", "stages", 3, "sft", "nothing")) is None
    assert model_at(TrainingRun, ("spec", "seed")) is None


def test_shapes_see_through_optional_and_annotated() -> None:
    for model in walk_models(TrainingRun):
        for name, field in fields_of(model).items():
            shape = shape_of(field.annotation)
            assert sum(part is not None for part in (shape.model, shape.item, shape.value, shape.scalar)) == 1, name
            assert shape.optional == (type(None) in getattr(field.annotation, "__args__", ())), name


def test_a_second_weight_of_zero_leaves_a_set_out() -> None:
    run = validate(
        edited(
            ("stages.sft.sft.data", [{"uri": "a.json", "weight": 1}, {"uri": "b.json", "weight": 0}]),
        )
    )
    config = run.spec.stages[3].config
    assert isinstance(config, SftStage)
    assert [source.weight for source in config.data] == [1.0, 0.0]


def test_the_contract_imports_no_client_and_no_tensor_library() -> None:
    script = (
        "import sys\n"
        "from stagecoach_api import *\n"
        "import stagecoach_api.schema.generate, stagecoach_api.store\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_package_alone_imports_no_model() -> None:
    script = "import sys, stagecoach_api; print('pydantic' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_face_of_the_package_is_pinned() -> None:
    assert stagecoach_api.__all__ == [
        "STAGE_KINDS",
        "InvalidRun",
        "LoadedRun",
        "Problem",
        "RunState",
        "Stage",
        "StageState",
        "TrainingRun",
        "TrainingRunStatus",
        "code_identity",
        "load_run",
        "parse_run",
        "validate",
    ]
    for name in stagecoach_api.__all__:
        assert getattr(stagecoach_api, name) is not None
    assert dir(stagecoach_api) == sorted(stagecoach_api.__all__)


def test_a_name_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stagecoach_api.nothing


@pytest.mark.parametrize(("written", "kept"), [(4, "4"), ("4", "4"), ("500m", "500m")])
def test_a_quantity_is_kept_as_text_however_it_is_written(written: object, kept: str) -> None:
    run = validate(edited(("defaults.resources", {"cpu": written})))
    assert run.spec.defaults.resources.cpu == kept
    assert validate(run.model_dump(mode="json", by_alias=True, exclude_none=True)) == run
