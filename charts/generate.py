"""Generates values.schema.json and the table in README.md from a chart's values.yaml, and the versions in Chart.yaml.

python charts/generate.py [--check]

The comment above a value is its description. Its last line may be `Schema: {…}`: JSON Schema keywords that cannot be
derived from the default. A mapping without that line is a section, and each of its members is a value with a comment.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stagecoach_api.schema.generated_files import write_or_check
from stagecoach_api.version import __version__

CHART = Path(__file__).resolve().parent / "stagecoach"
TABLE_BEGIN = "<!-- values: written by `make generate` from values.yaml -->"
TABLE_END = "<!-- end of values -->"
SCHEMA_MARK = "Schema:"

Schema = dict[str, Any]

DEFINITIONS: Schema = {
    "quantities": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    "allowedStorage": {
        "type": "object",
        "properties": {
            "endpoint": {"type": "string", "minLength": 1, "maxLength": 512},
            "buckets": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        },
        "required": ["buckets"],
        "additionalProperties": False,
    },
    "free": {"minProperties": 1},  # an object of the Kubernetes API, which the API server checks
    "spread": {
        "type": "object",
        "properties": {
            "topologyKey": {"type": "string", "minLength": 1},
            "maxSkew": {"type": "integer", "minimum": 1},
            "whenUnsatisfiable": {"enum": ["DoNotSchedule", "ScheduleAnyway"]},
        },
        "required": ["topologyKey"],
        "additionalProperties": False,
    },
    "toleration": {
        "type": "object",
        "properties": {
            "key": {"type": "string"},
            "operator": {"enum": ["Exists", "Equal"]},
            "value": {"type": "string"},
            "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            "tolerationSeconds": {"type": "integer"},
        },
        "additionalProperties": False,
    },
}
"""Definitions for use in `Schema:` lines."""

TYPES: dict[type, str] = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}


class ChartError(ValueError):
    """A file of the chart lacks something that the generated files need."""


@dataclass(frozen=True)
class Value:
    """One value of the chart, or a section of them."""

    path: tuple[str, ...]
    description: str
    default: Any
    schema: Schema
    """Keywords from the `Schema:` line."""
    members: tuple[Value, ...]
    """The members of a section; empty for a value."""

    @property
    def name(self) -> str:
        return ".".join(self.path)


def read_values(text: str) -> tuple[Value, ...]:
    """Return the values of a values.yaml. Raises ChartError with the names of all that lack a comment."""
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ChartError("values.yaml: must be a mapping")
    values = tuple(_members(root, text.splitlines(), ()))
    bare = [value.name for value in every(values) if not value.description]
    if bare:
        raise ChartError(f"values.yaml: without a comment: {', '.join(bare)}; describe each in a comment above it")
    return values


def every(values: Sequence[Value]) -> Iterator[Value]:
    """Yield values and sections, outer ones first."""
    for value in values:
        yield value
        yield from every(value.members)


def _members(node: yaml.MappingNode, lines: Sequence[str], above: tuple[str, ...]) -> Iterator[Value]:
    for key, content in node.value:
        path = (*above, key.value)
        description, schema = _comment(lines, key.start_mark.line)
        section = isinstance(content, yaml.MappingNode) and bool(content.value) and not schema
        members = tuple(_members(content, lines, path)) if section else ()
        default = yaml.SafeLoader("").construct_document(content)
        yield Value(path, description, default, schema, members)


def _comment(lines: Sequence[str], at: int) -> tuple[str, Schema]:
    """Return the comment directly above a line, and the keywords of its `Schema:` line."""
    first = at
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    comment = [line.lstrip().removeprefix("#").strip() for line in lines[first:at]]
    schema: Schema = {}
    if comment and comment[-1].startswith(SCHEMA_MARK):
        schema = yaml.safe_load(comment.pop().removeprefix(SCHEMA_MARK))
    return " ".join(comment), schema


# -- the schema --------------------------------------------------------------------------------------------------------


def schema_text(values: Sequence[Value]) -> str:
    """Return values.schema.json. Its objects are closed, so that misspelt values are rejected."""
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",  # the newest draft that all versions of Helm 3 support
        **_section(values),
        "definitions": DEFINITIONS,
    }
    # Helm passes `global` to a subchart.
    schema["properties"]["global"] = {"description": "Values of a parent chart. Not used.", "type": "object"}
    return json.dumps(schema, indent=2) + "\n"


def _section(values: Sequence[Value]) -> Schema:
    properties = {value.path[-1]: _schema(value) for value in values}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema(value: Value) -> Schema:
    described: Schema = {"description": value.description}
    if value.members:
        return described | _section(value.members)
    schema = described | {"type": TYPES[type(value.default)]} | value.schema
    if schema["type"] == "object":
        schema.setdefault("additionalProperties", False)
    return schema | {"default": value.default}


# -- the README --------------------------------------------------------------------------------------------------------


def readme_text(readme: str, values: Sequence[Value]) -> str:
    """Return the README with its table of values regenerated. Raises ChartError if the table's markers are missing."""
    head, begin, rest = readme.partition(TABLE_BEGIN)
    _, end, tail = rest.partition(TABLE_END)
    if not begin or not end:
        raise ChartError(
            f"README.md: no place for the values: it must contain the lines `{TABLE_BEGIN}` and `{TABLE_END}`"
        )
    return f"{head}{begin}\n{_table(values)}{end}{tail}"


def _table(values: Sequence[Value]) -> str:
    rows = [f"| `{value.name}` | {_cell(value)} | {_default(value)} |\n" for value in every(values)]
    return "| Value | Description | Default |\n|---|---|---|\n" + "".join(rows)


def _cell(value: Value) -> str:
    return value.description.replace("|", "\\|")


def _default(value: Value) -> str:
    return "" if value.members else f"`{json.dumps(value.default)}`"


# -- Chart.yaml --------------------------------------------------------------------------------------------------------


def chart_text(metadata: str, version: str) -> str:
    """Return Chart.yaml with a version as `version` and `appVersion`. Raises ChartError if one of them is missing."""
    for name in ("version", "appVersion"):
        metadata, count = re.subn(rf"^{name}: .*$", f"{name}: {version}", metadata, flags=re.MULTILINE)
        if count != 1:
            raise ChartError(f"Chart.yaml: {count} lines `{name}: …`; it must contain exactly one")
    return metadata


# -- writing and checking ----------------------------------------------------------------------------------------------


def wanted(chart: Path) -> dict[str, str]:
    """Return the names and contents of the files to generate. Raises ChartError."""
    values = read_values((chart / "values.yaml").read_text(encoding="utf-8"))
    readme = (chart / "README.md").read_text(encoding="utf-8")
    metadata = (chart / "Chart.yaml").read_text(encoding="utf-8")
    return {
        "values.schema.json": schema_text(values),
        "README.md": readme_text(readme, values),
        "Chart.yaml": chart_text(metadata, __version__),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if `--check` found an outdated file, or a file cannot be generated."""
    parser = argparse.ArgumentParser(prog="python charts/generate.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is outdated")
    parser.add_argument("--chart", type=Path, default=CHART, help="folder of the chart (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        texts = wanted(options.chart)
    except ChartError as error:
        print(error, file=sys.stderr)
        return 1
    chart = options.chart.resolve()
    return write_or_check(chart.parent, {f"{chart.name}/{name}": text for name, text in texts.items()}, options.check)


if __name__ == "__main__":
    sys.exit(main())
