"""Nulls in objects of JSON: those that a writer of JSON lines has filled in are left out, those that may be meant stay.

`datasets.Dataset.to_json` gives each object of a column the members of all of them, as Parquet's structs have them. A
null member of a record, a turn or a tool states nothing in any case. The arguments of a call are what a model
learns to write: a null there is left out only if the tool's own schema does not allow it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

NULLS_LEFT_OUT = "nullsLeftOut"
NULLS_KEPT = "nullsKept"
"""Counts of records by what was done with null members of tools and of the arguments of calls."""

TOOL_FIELDS = ("tools", "functions")
ARGUMENTS = ("arguments", "parameters")
NULL_HAS_MEANING = ("default", "const")
"""Members of a JSON schema that may be null and mean it."""

CONSTRAINTS = ("type", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "nullable")

Schemas = Mapping[str, Any]
"""Schema of the arguments of each tool, by the tool's name."""


def without_padding(value: Mapping[str, Any], tools: str | None = None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return a record without filled-in nulls, and which of `NULLS_LEFT_OUT` and `NULLS_KEPT` apply to it.

    `tools`: name of the field with the tools, if it is not one of `TOOL_FIELDS`. Tools and arguments that are JSON text
    are content: no writer fills in text.
    """
    names = (tools,) if tools else TOOL_FIELDS
    found: set[str] = set()
    described = {name: _tools(value[name], found) for name in names if isinstance(value.get(name), list)}
    schemas = _schemas({**value, **described}, names)
    rest = {name: held for name, held in value.items() if name not in described}
    cleaned = {**_members(rest, schemas, found), **described}
    # In the order of the value: messages list fields in it.
    return {name: cleaned[name] for name in value if name in cleaned}, tuple(sorted(found))


# -- records and turns -------------------------------------------------------------------------------------------------


def _members(value: Mapping[str, Any], schemas: Schemas, found: set[str]) -> dict[str, Any]:
    called = value.get("name")
    kept = {}
    for name, held in value.items():
        if held is None:
            continue
        if isinstance(called, str) and name in ARGUMENTS:
            kept[name] = _settled(held, schemas.get(called), found)
        else:
            kept[name] = _without_null_members(held, schemas, found)
    return kept


def _without_null_members(value: Any, schemas: Schemas, found: set[str]) -> Any:
    if isinstance(value, Mapping):
        return _members(value, schemas, found)
    if isinstance(value, list):
        return [_without_null_members(item, schemas, found) for item in value]
    return value


# -- tools -------------------------------------------------------------------------------------------------------------


def _tools(value: Any, found: set[str]) -> Any:
    """Return the description of tools, or a part of one, without members that are null and state nothing."""
    if isinstance(value, list):
        return [_tools(item, found) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {name: held for name, held in value.items() if held is not None or name in NULL_HAS_MEANING}
    if len(kept) < len(value):
        found.add(NULLS_LEFT_OUT)
    return {name: _tools(held, found) for name, held in kept.items()}


def _schemas(value: Mapping[str, Any], names: Sequence[str]) -> Schemas:
    schemas = {}
    for name in names:
        tools = value.get(name)
        if isinstance(tools, str):
            with suppress(ValueError):
                tools = json.loads(tools)
        for tool in tools if isinstance(tools, list) else ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                schemas[function["name"]] = function.get("parameters")
    return schemas


# -- arguments ---------------------------------------------------------------------------------------------------------


def _settled(value: Any, schema: Any, found: set[str]) -> Any:
    """Return arguments, or a part of them, without nulls that their schema does not allow."""
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [_settled(item, items, found) for item in value]
    if not isinstance(value, Mapping):
        return value
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    properties = properties if isinstance(properties, Mapping) and properties else None
    kept = {}
    for name, held in value.items():
        if held is not None:
            kept[name] = _settled(held, None if properties is None else properties.get(name), found)
        elif properties is None or (name in properties and _allows_null(properties[name])):
            found.add(NULLS_KEPT)
            kept[name] = None
        else:
            found.add(NULLS_LEFT_OUT)
    return kept


def _allows_null(schema: Any) -> bool:
    """Return whether a schema allows null, as far as it can be seen without following references."""
    if not isinstance(schema, Mapping) or "$ref" in schema or not any(name in schema for name in CONSTRAINTS):
        return True
    types = schema.get("type")
    if types == "null" or (isinstance(types, list) and "null" in types) or schema.get("nullable") is True:
        return True
    if None in _listed(schema, "enum") or ("const" in schema and schema["const"] is None):
        return True
    return any(_allows_null(option) for name in ("anyOf", "oneOf", "allOf") for option in _listed(schema, name))


def _listed(schema: Mapping[str, Any], name: str) -> Sequence[Any]:
    held = schema.get(name)
    return held if isinstance(held, list) else ()
