"""The stage digest: a hash over everything that a stage's artifact depends on, and nothing else.

It covers the kind, the configuration with every input replaced by its content digest, the seed and the code. It does
not cover the names of run and stages, resources, queue, retries, time-out and order (`after`). Fields that are None are
left out, so that a new optional field of the API does not invalidate existing artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from pydantic import JsonValue

from stagecoach_api.artifacts import digest_of
from stagecoach_api.base import Model
from stagecoach_api.kinds.pretrain import DataWeight
from stagecoach_api.references import Reference
from stagecoach_api.spec import Stage
from stagecoach_api.training import Training
from stagecoach_core.values import Found, PlannedStage


def stage_digest(planned: PlannedStage, inputs: Mapping[str, str], code: str) -> str:
    """Return the stage digest (SHA-256, hex).

    `inputs`: content digest of every input, by `Reference.key`. `code`: identity of the trainer's code, which a custom
    image given by digest replaces.
    """
    stage = planned.stage
    identity = {
        "kind": stage.kind,
        "config": _canonical(stage.config, inputs, _derived_names(stage.config)),
        "seed": stage.seed or 0,
        "code": stage_code(stage, code),
    }
    return digest_of(identity)


def input_digests(planned: PlannedStage, finished: Mapping[str, Found]) -> dict[str, str] | None:
    """Return the content digest of every input by `Reference.key`. None if an input is not finished.

    `finished`: artifacts by stage name.
    """
    digests: dict[str, str] = {}
    for _, reference in planned.stage.references():
        if reference.stage is None:
            digests[reference.key] = planned.externals[reference.key].digest
        elif reference.stage in finished:
            digests[reference.key] = finished[reference.stage].content_digest
        else:
            return None
    return digests


def stage_code(stage: Stage, code: str) -> str:
    """Return the identity of the code that runs a stage: the digest of its image if it has one, else `code`."""
    _, separator, digest = (stage.image or "").partition("@")
    return digest if separator else code  # a tag does not count: it can be moved to another image


def _canonical(value: object, inputs: Mapping[str, str], names: Mapping[str, str]) -> JsonValue:
    if isinstance(value, Model):
        return _canonical_model(value, inputs, names)
    if isinstance(value, tuple):
        return [_canonical(item, inputs, names) for item in value]
    if isinstance(value, Enum):
        return _canonical(value.value, inputs, names)
    if isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a configuration contains a {type(value).__name__}, which has no canonical form")


def _canonical_model(model: Model, inputs: Mapping[str, str], names: Mapping[str, str]) -> dict[str, JsonValue]:
    # Inputs count by content: where it comes from (`stage`, `uri`) is replaced by its digest.
    members = {
        field.alias or name: _canonical(getattr(model, name), inputs, names)
        for name, field in type(model).model_fields.items()
        if getattr(model, name) is not None and not (isinstance(model, Reference) and name in ("stage", "uri"))
    }
    if isinstance(model, Reference):
        members["digest"] = inputs[model.key]
    if isinstance(model, DataWeight):
        members["name"] = names.get(model.name, model.name)
    file_field = model.input_file
    if file_field is not None and getattr(model, file_field) is not None:
        alias = type(model).model_fields[file_field].alias or file_field
        members[alias] = {"digest": inputs[Reference(uri=getattr(model, file_field)).key]}
    return members


def _derived_names(config: Model) -> dict[str, str]:
    """Return replacements for names of data sets that derive from a stage or file: their index in `data`.

    Phases may refer to these names. Without the replacement, renaming a stage would change the digest.
    """
    if not isinstance(config, Training):
        return {}
    return {source.label: f"data[{index}]" for index, source in enumerate(config.data) if source.name is None}
