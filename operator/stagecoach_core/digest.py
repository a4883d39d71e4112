"""The stage digest: what a stage's work depends on, and nothing else.

In it: kind, configuration with every input replaced by its content, seed, code. Not in it: names of run and stages,
resources, queue, retries, time-out, order (`after`). Fields that are None are left out, so that the contract may grow
an optional field without making all artifacts anew.
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
    """Return the digest (hex sha256) of a stage's work.

    `inputs`: content digest of every input, by `Reference.key`. `code`: identity of the trainer's code; a custom image
    given by digest counts instead of it.
    """
    stage = planned.stage
    identity = {
        "kind": stage.kind,
        "config": _canonical(stage.config, inputs, _derived_names(stage.config)),
        "seed": stage.seed or 0,
        "code": code_identity(stage, code),
    }
    return digest_of(identity)


def input_digests(planned: PlannedStage, finished: Mapping[str, Found]) -> dict[str, str] | None:
    """Return the content digest of every input by `Reference.key`. None: a stage whose artifact is read is missing
    from `finished`, artifacts by name of stage."""
    digests: dict[str, str] = {}
    for _, reference in planned.stage.references():
        if reference.stage is None:
            digests[reference.key] = planned.externals[reference.key].digest
        elif reference.stage in finished:
            digests[reference.key] = finished[reference.stage].content_digest
        else:
            return None
    return digests


def code_identity(stage: Stage, code: str) -> str:
    """Return what stands for the code that does the work: the image's digest where one is given, else `code`."""
    _, at, digest = (stage.image or "").partition("@")
    return digest if at else code


def _canonical(value: object, inputs: Mapping[str, str], names: Mapping[str, str]) -> JsonValue:
    if isinstance(value, Model):
        return _canonical_model(value, inputs, names)
    if isinstance(value, tuple):
        return [_canonical(item, inputs, names) for item in value]
    if isinstance(value, Enum):
        return _canonical(value.value, inputs, names)
    if isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a configuration holds {type(value).__name__}, which has no canonical form")


def _canonical_model(model: Model, inputs: Mapping[str, str], names: Mapping[str, str]) -> dict[str, JsonValue]:
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
    """Return stand-ins for data sets called after their stage or file, which phases may name: their place in `data`."""
    if not isinstance(config, Training):
        return {}
    return {source.label: f"data[{place}]" for place, source in enumerate(config.data) if source.name is None}
