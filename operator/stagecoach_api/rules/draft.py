"""A run as far as it can be read, so that one fault does not hide the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from stagecoach_api.base import Model
from stagecoach_api.fields import FieldPath, format_path
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.problems import Problem


@dataclass(frozen=True)
class Fault:
    """What a rule found: a problem with its path in steps."""

    path: FieldPath
    value: Any
    rule: str
    remedy: str

    def as_problem(self) -> Problem:
        return Problem(format_path(self.path), self.value, self.rule, self.remedy)


@dataclass(frozen=True)
class Link:
    """One place where a stage names another."""

    path: FieldPath
    """Of the mapping `{stage: target}`, or of the entry in `after`."""
    target: str
    is_input: bool
    """The target's artifact is read; false for `after`."""

    @property
    def field(self) -> str:
        """Name of the field the input stands in, indexes apart."""
        return next(step for step in reversed(self.path) if isinstance(step, str))


@dataclass(frozen=True)
class DraftStage:
    """One entry of `spec.stages`; what could not be read is None."""

    path: FieldPath
    raw: Mapping[str, Any]
    name: str | None
    kind: str | None
    """None: no kind, or more than one."""
    config: Model | None
    """The kind's configuration. None: the schema refuses it."""
    links: tuple[Link, ...]

    def at(self, *steps: str | int) -> FieldPath:
        """Return the path of a field of this stage's configuration."""
        return (*self.path, self.kind or "", *steps)


@dataclass(frozen=True)
class Draft:
    """A run that may have faults."""

    document: Mapping[str, Any]
    stages: tuple[DraftStage, ...]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Draft:
        """Read as much of a document (JSON values) as can be read."""
        stages = _mapping(document.get("spec")).get("stages")
        entries = enumerate(stages) if isinstance(stages, list | tuple) else ()
        return cls(document, tuple(_read_stage(index, raw) for index, raw in entries if isinstance(raw, Mapping)))

    @property
    def spec(self) -> Mapping[str, Any]:
        return _mapping(self.document.get("spec"))

    @property
    def storage(self) -> Mapping[str, Any]:
        return _mapping(self.spec.get("storage"))

    @property
    def by_name(self) -> dict[str, DraftStage]:
        """Stages by name; of several with one name the first."""
        found: dict[str, DraftStage] = {}
        for stage in self.stages:
            if stage.name is not None:
                found.setdefault(stage.name, stage)
        return found


C = TypeVar("C", bound=Model)


def configs(draft: Draft, kind: type[C]) -> Iterator[tuple[DraftStage, C]]:
    """Yield the stages whose configuration is a `kind` and could be read."""
    for stage in draft.stages:
        if isinstance(stage.config, kind):
            yield stage, stage.config


def walk(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    """Yield everything below a JSON value with its path, itself first, in its order."""
    waiting: list[tuple[FieldPath, Any]] = [(path, value)]
    while waiting:
        place, here = waiting.pop()
        yield place, here
        if isinstance(here, Mapping):
            waiting += [((*place, name), item) for name, item in reversed(list(here.items()))]
        elif isinstance(here, list | tuple):
            waiting += [((*place, index), here[index]) for index in reversed(range(len(here)))]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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
        config=_read_config(kind, raw[kind]) if kind is not None else None,
        links=tuple(_links(raw, path)),
    )


def _read_config(kind: str, raw: Any) -> Model | None:
    try:
        return STAGE_KINDS[kind].model_validate_json(json.dumps(raw), strict=True, by_alias=True, by_name=False)
    except (ValidationError, TypeError, ValueError, RecursionError):
        return None


def _links(raw: Mapping[str, Any], path: FieldPath) -> Iterator[Link]:
    for kind in STAGE_KINDS:
        for place, value in walk(raw.get(kind), (*path, kind)):
            if isinstance(value, Mapping) and isinstance(value.get("stage"), str):
                yield Link(place, value["stage"], is_input=True)
    after = raw.get("after")
    for index, target in enumerate(after if isinstance(after, list | tuple) else ()):
        if isinstance(target, str):
            yield Link((*path, "after", index), target, is_input=False)
