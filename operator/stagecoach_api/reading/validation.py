"""Is this a run? Every problem at once: of the schema, and of the graph that the stages make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from stagecoach_api.fields import FieldPath
from stagecoach_api.problems import MISSING, InvalidRun, Problem
from stagecoach_api.reading.schema_errors import schema_problems
from stagecoach_api.rules import RULES, Draft
from stagecoach_api.spec import TrainingRun

__all__ = ["MISSING", "InvalidRun", "Problem", "validate", "validate_with_paths"]

# What the API server writes into an object. A file made by `kubectl get -o yaml` is a run all the same.
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


def validate(document: Mapping[str, Any]) -> TrainingRun:
    """Return the run that `document` (a mapping of JSON values) describes.

    Raises `InvalidRun` with all problems.
    """
    run, found = validate_with_paths(document)
    if run is None or found:
        raise InvalidRun(problem for _, problem in found)
    return run


def validate_with_paths(document: Mapping[str, Any]) -> tuple[TrainingRun | None, list[tuple[FieldPath, Problem]]]:
    """Return the run, where the schema accepts it, and all problems with their paths, in the order of the document."""
    document = _without_server_fields(document)
    try:
        text = json.dumps(document)
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "use text, numbers, lists and mappings"
        return None, [((), Problem("", MISSING, f"must be made of JSON values: {error}", remedy))]
    run, found = _parse(text)
    draft = Draft.of(document)
    for rule in RULES:
        found += [(fault.path, fault.as_problem()) for fault in rule(draft)]
    return run, found


def _parse(text: str) -> tuple[TrainingRun | None, list[tuple[FieldPath, Problem]]]:
    """Check the schema as the API server would: names as in YAML only, no conversion of types."""
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
