"""JSON Schema (draft 2020-12) of a run file, for editors: names, types, ranges, defaults and one-of members."""

from __future__ import annotations

from typing import Any

from stagecoach_api.fields import fields_of, one_of_members, walk_models
from stagecoach_api.names import API_GROUP_VERSION, KIND
from stagecoach_api.schema.crd import Schema
from stagecoach_api.schema.defaults import described
from stagecoach_api.spec import TrainingRun


def editor_schema() -> Schema:
    """Return the JSON Schema of a TrainingRun."""
    schema = TrainingRun.model_json_schema(by_alias=True)
    for model in walk_models(TrainingRun):
        members = one_of_members(model)
        if members and model.__name__ in schema["$defs"]:
            schema["$defs"][model.__name__]["oneOf"] = [{"required": [member]} for member in members]
        definition = schema if model is TrainingRun else schema["$defs"].get(model.__name__, {})
        for name, field in fields_of(model).items():
            definition["properties"][name]["description"] = described(name, field)
    tidied: Schema = _tidy(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{KIND} {API_GROUP_VERSION}", **tidied}


def _tidy(node: Any, *, keywords: bool = True) -> Any:
    """Drop generated titles and the nulls of defaults; make descriptions one paragraph.

    `keywords`: the mapping's keys are keywords, not names of properties or definitions.
    """
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    found: dict[str, Any] = {}
    for key, value in node.items():
        if keywords and key == "title":
            continue
        if keywords and key == "description":
            found[key] = " ".join(value.split())
        elif keywords and key == "default":
            found[key] = _without_nulls(value)
        else:
            found[key] = _tidy(value, keywords=not (keywords and key in {"properties", "$defs"}))
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
