"""Checks a run: every problem at once, of the schema and of the rules over stages and their graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from stagecoach_api.draft import Rule, stage_names
from stagecoach_api.fields import FieldPath, format_path
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.problems import MISSING, InvalidRun, Problem
from stagecoach_api.reading.read_draft import read_draft
from stagecoach_api.reading.schema_errors import schema_problems
from stagecoach_api.rules import SHARED_RULES
from stagecoach_api.spec import TrainingRun

__all__ = ["MISSING", "InvalidRun", "Problem", "validate", "validate_with_paths"]

# Fields the API server adds to an object; the output of `kubectl get -o yaml` is a valid run file too.
_SERVER_METADATA = frozenset(
    {
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generateName",
        "generation",
        "managedFields",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    }
)


RULES: tuple[Rule, ...] = (*SHARED_RULES, *(rule for kind in STAGE_KINDS.values() for rule in kind.rules))
"""Every rule that no schema can express: those of all stages, then those of each kind."""


def validate(document: Mapping[str, Any]) -> TrainingRun:
    """Return the run that `document` (a mapping of JSON values) describes.

    Raises `InvalidRun` with all problems.
    """
    run, found = validate_with_paths(document)
    if run is None or found:
        raise InvalidRun(problem for _, problem in found)
    return run


def validate_with_paths(document: Mapping[str, Any]) -> tuple[TrainingRun | None, list[tuple[FieldPath, Problem]]]:
    """Return the run, None if the schema rejects it, and all problems with their paths, in the document's order."""
    document = _without_server_fields(document)
    try:
        text = json.dumps(document)
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "use text, numbers, lists and mappings"
        return None, [((), Problem("", MISSING, f"must be made of JSON values: {error}", remedy))]
    run, found = _parse(text)
    draft = read_draft(document)
    for rule in RULES:
        found += [(fault.path, fault.as_problem()) for fault in rule(draft)]
    names = stage_names(document)
    return run, [(path, replace(problem, path=format_path(path, names))) for path, problem in found]


def _parse(text: str) -> tuple[TrainingRun | None, list[tuple[FieldPath, Problem]]]:
    """Check the schema as the API server does: field names as in YAML only, no conversion of types."""
    try:
        return TrainingRun.model_validate_json(text, strict=True, by_alias=True, by_name=False), []
    except ValidationError as error:
        return None, schema_problems(TrainingRun, error)


def _without_server_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in document.items() if name != "status"}
    metadata = kept.get("metadata")
    if isinstance(metadata, Mapping):
        kept["metadata"] = {name: value for name, value in metadata.items() if name not in _SERVER_METADATA}
    return kept
