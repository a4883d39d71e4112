"""`docs/reference.md`: every field of the contract, with its type, default and description, from the models."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from stagecoach_api.base import Model
from stagecoach_api.fields import fields_of, one_of_members, walk_models
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.names import API_GROUP_VERSION, KIND
from stagecoach_api.schema.crd import PRINTER_COLUMNS
from stagecoach_api.schema.defaults import default_text, described
from stagecoach_api.spec import TrainingRun
from stagecoach_api.status import ConditionType, Reason, TrainingRunStatus

Schema = dict[str, Any]

HEAD = f"""\
# Reference: {KIND}

<!-- Generated from operator/stagecoach_api by `make generate`; do not edit. -->

Every field of `{API_GROUP_VERSION}`, kind `{KIND}`, by its name in YAML. Optional fields take the default shown; if
none is shown, the text after "If unset" applies. Editors complete and check run files with
[`schema/trainingrun.schema.json`](schema/trainingrun.schema.json):

```yaml
# yaml-language-server: $schema=docs/schema/trainingrun.schema.json
apiVersion: {API_GROUP_VERSION}
kind: {KIND}
```

Numbers may be written as `2e-5`, `1e9` or `1_000_000`. Aliases, anchors, tags and duplicate fields are rejected, and so
are unquoted values that YAML and `kubectl` read differently (`yes`, `no`, `on`, `off`, `y`, `n`).
"""


def reference_page() -> str:
    """Return the page as Markdown."""
    of_kinds = {name: list(walk_models(kind.config)) for name, kind in STAGE_KINDS.items()}
    parts_of_kinds = {model for models in of_kinds.values() for model in models}
    definitions = _definitions(TrainingRun)
    run_models = [model for model in walk_models(TrainingRun) if model not in parts_of_kinds]
    parts = [HEAD, _contents(), "## The run\n", *(_section(model, definitions) for model in run_models)]
    written = set(run_models)
    for kind, models in of_kinds.items():
        # A model that several kinds share is described with the first of them.
        parts += [f"## Stage kind `{kind}`\n", *(_section(part, definitions) for part in models if part not in written)]
        written |= set(models)
    definitions = _definitions(TrainingRunStatus)
    parts += ["## Status\n", _conditions()]
    parts += [_section(model, definitions) for model in walk_models(TrainingRunStatus)]
    return "\n".join(parts).rstrip("\n") + "\n"


def _definitions(root: type[Model]) -> dict[str, Schema]:
    """JSON schemas of a model and all below it, by the models' names."""
    schema = root.model_json_schema(by_alias=True)
    definitions: dict[str, Schema] = schema.pop("$defs", {})
    return {root.__name__: schema, **definitions}


def _contents() -> str:
    kinds = " · ".join(f"[`{kind}`](#stage-kind-{kind.lower()})" for kind in STAGE_KINDS)
    return f"[The run](#the-run) · stage kinds {kinds} · [status](#status)\n"


def _conditions() -> str:
    columns = ", ".join(name.upper() for name, _, _ in PRINTER_COLUMNS)
    return (
        f"`kubectl get {KIND.lower()}s` shows {columns}. Conditions: {_listed(ConditionType)}.\n\n"
        f"Reasons, whose meaning never changes: {_listed(Reason)}.\n"
    )


def _listed(words: Any) -> str:
    return ", ".join(f"`{word}`" for word in words)


# -- one model ---------------------------------------------------------------------------------------------------------


def _section(model: type[Model], definitions: dict[str, Schema]) -> str:
    lines = [f"### {model.__name__}\n", _paragraph(model.__doc__), ""]
    members = one_of_members(model)
    if members and "xactly one" not in (model.__doc__ or ""):
        lines += [f"Exactly one of {_listed(members)} must be set.", ""]
    if fields_of(model):
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        lines += [_row(model, name, definitions) for name in fields_of(model)]
        lines.append("")
    return "\n".join(lines)


def _row(model: type[Model], name: str, definitions: dict[str, Schema]) -> str:
    field = fields_of(model)[name]
    node = definitions[model.__name__]["properties"][name]
    cells = (f"`{name}`", _type(node, definitions), _default(field), _description(name, field))
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


def _default(field: FieldInfo) -> str:
    """Return the cell of a default; a long one is in the description instead."""
    if field.is_required():
        return "**required**"
    text = default_text(field)
    return f"`{text}`" if text and len(text) <= MAX_DEFAULT_CHARACTERS else ""


def _description(name: str, field: FieldInfo) -> str:
    long = len(default_text(field)) > MAX_DEFAULT_CHARACTERS
    return described(name, field) if long else _paragraph(field.description)


MAX_DEFAULT_CHARACTERS = 40


# -- types -------------------------------------------------------------------------------------------------------------


def _type(node: Schema, definitions: dict[str, Schema]) -> str:
    """Return the type and its limits, such as `integer, 1 to 64`."""
    if "anyOf" in node:
        (inner,) = [member for member in node["anyOf"] if member.get("type") != "null"]
        return _type(inner, definitions)
    if "$ref" in node:
        name = node["$ref"].removeprefix("#/$defs/")
        target = definitions[name]
        return f"[{name}](#{name.lower()})" if target.get("type") == "object" else _type(target, definitions)
    if "enum" in node or "const" in node:
        return " · ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        return f"list{_range(node, 'minItems', 'maxItems')}, of {_type(node['items'], definitions)}"
    if node.get("type") == "object":
        return f"mapping of text to {_type(node['additionalProperties'], definitions)}"
    return _scalar(node)


def _scalar(node: Schema) -> str:
    match node.get("type"):
        case ["integer", "string"]:
            return "quantity"
        case "string":
            if node.get("format") == "date-time":
                return "time (RFC 3339)"
            return f"text{_range(node, 'minLength', 'maxLength', ' characters')}"
        case "integer" | "number" as kind:
            return f"{kind}{_range(node, 'minimum', 'maximum')}"
    return str(node.get("type", "any"))


def _range(node: Schema, low: str, high: str, unit: str = "") -> str:
    least, most = node.get(low), node.get(high)
    if least is not None and most is not None:
        return f", {_number(least)} to {_number(most)}{unit}"
    if least is not None:
        return f", at least {_number(least)}{unit}"
    return f", at most {_number(most)}{unit}" if most is not None else ""


LARGEST_WRITTEN_OUT = 10**12


def _number(value: float) -> str:
    if value == int(value) and abs(value) <= LARGEST_WRITTEN_OUT:
        return f"{int(value):,}"
    return f"{value:g}"
