"""Defaults in descriptions and tables, in YAML's flow style."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from stagecoach_api.base import Model
from stagecoach_api.fields import fields_of, walk_models
from stagecoach_api.kinds.data import DataStage
from stagecoach_api.reading.yaml_reader import read_yaml
from stagecoach_api.schema.defaults import default_text, described
from stagecoach_api.spec import TrainingRun
from stagecoach_api.training import HeldOut, LoraTraining, Optimizer, Training
from tests.api.schema.test_crd import SCHEMA


@pytest.mark.parametrize(
    ("model", "name", "text"),
    [
        (Optimizer, "learningRate", ""),
        (Optimizer, "epsilon", "1e-8"),
        (Optimizer, "clip", "1"),
        (Training, "precision", "bf16"),
        (Training, "gradientCheckpointing", "false"),
        (Training, "budget", "{epochs: 1}"),
        (Training, "trainable", "{full: {}}"),
        (Training, "schedule", "{}"),
        (HeldOut, "everySteps", ""),
        (HeldOut, "maxTokens", "65536"),
        (LoraTraining, "targets", "[all-linear]"),
        (DataStage, "steps", "[{normalize: {}}, {length: {}}, {deduplicate: {}}]"),
    ],
)
def test_a_default_is_written_as_in_yaml(model: type[Model], name: str, text: str) -> None:
    assert default_text(fields_of(model)[name]) == text


def test_a_default_is_added_to_the_description_unless_it_is_null_or_empty() -> None:
    assert described("budget", fields_of(Training)["budget"]).endswith(" Default: {epochs: 1}.")
    assert described("shardBytes", fields_of(DataStage)["shardBytes"]).endswith(" Default: 268435456 (256 MiB).")
    for model, name in (
        (Training, "schedule"),
        (HeldOut, "sets"),
        (HeldOut, "everySteps"),
        (Optimizer, "learningRate"),
    ):
        assert "Default" not in described(name, fields_of(model)[name])


def test_every_default_read_as_yaml_is_the_default() -> None:
    """A user may copy it into a run file."""
    for model in walk_models(TrainingRun):
        for name, field in fields_of(model).items():
            if text := default_text(field):
                read: Any = TypeAdapter(field.annotation).validate_python(read_yaml(text).value)
                assert read == field.get_default(call_default_factory=True), (model.__name__, name)


def test_the_crd_states_defaults_of_the_spec_and_none_of_the_status() -> None:
    spec, status = SCHEMA["properties"]["spec"], SCHEMA["properties"]["status"]
    assert spec["properties"]["seed"]["description"].endswith(" Default: 0.")
    assert "Default:" not in str(status)
