"""Reads as much of a document as can be read, each stage for itself."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from stagecoach_api.base import Model
from stagecoach_api.draft import Draft, DraftStage, Link, walk
from stagecoach_api.fields import FieldPath, walk_models
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.references import ArtifactType


def read_draft(document: Mapping[str, Any]) -> Draft:
    """Return the draft of a document (JSON values)."""
    spec = document.get("spec")
    stages = spec.get("stages") if isinstance(spec, Mapping) else None
    entries = enumerate(stages) if isinstance(stages, list | tuple) else ()
    read = tuple(_read_stage(index, raw) for index, raw in entries if isinstance(raw, Mapping))
    return Draft(document, read, _makers(), _uri_fields())


@cache
def _makers() -> Mapping[ArtifactType, tuple[str, ...]]:
    makers: dict[ArtifactType, list[str]] = defaultdict(list)
    for name, kind in STAGE_KINDS.items():
        makers[kind.makes].append(name)
    return {artifact: tuple(names) for artifact, names in makers.items()}


@cache
def _uri_fields() -> frozenset[str]:
    models = {model for kind in STAGE_KINDS.values() for model in walk_models(kind.config)}
    files = {str(model.model_fields[name].alias) for model in models if (name := model.input_file) is not None}
    return frozenset({"uri", "inputs"} | files)


def _read_stage(index: int, raw: Mapping[str, Any]) -> DraftStage:
    path: FieldPath = ("spec", "stages", index)
    name = raw.get("name")
    kinds = [kind for kind in STAGE_KINDS if raw.get(kind) is not None]
    kind = kinds[0] if len(kinds) == 1 else None
    return DraftStage(
        path=path,
        raw=raw,
        name=name if isinstance(name, str) else None,
        kind=kind,
        makes=STAGE_KINDS[kind].makes if kind is not None else None,
        config=_read_config(kind, raw[kind]) if kind is not None else None,
        links=tuple(_links(raw, path)),
    )


def _read_config(kind: str, raw: Any) -> Model | None:
    try:
        return STAGE_KINDS[kind].config.model_validate_json(json.dumps(raw), strict=True, by_alias=True, by_name=False)
    except (ValidationError, TypeError, ValueError, RecursionError):
        return None


def _links(raw: Mapping[str, Any], path: FieldPath) -> Iterator[Link]:
    for name, kind in STAGE_KINDS.items():
        for place, value in walk(raw.get(name), (*path, name)):
            if isinstance(value, Mapping) and isinstance(value.get("stage"), str):
                yield Link(place, value["stage"], kind.readable_at(place[len(path) + 1 :]))
    after = raw.get("after")
    for index, target in enumerate(after if isinstance(after, list | tuple) else ()):
        if isinstance(target, str):
            yield Link((*path, "after", index), target)
