"""A run as far as it can be read, so that one problem does not hide the others. Rules are functions of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from stagecoach_api.base import Model
from stagecoach_api.fields import FieldPath, format_path
from stagecoach_api.problems import Problem
from stagecoach_api.references import ArtifactType


@dataclass(frozen=True)
class Fault:
    """A violation of a rule: a problem with its path in steps."""

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
    reads: frozenset[ArtifactType] = frozenset()
    """Artifacts the field accepts; none for an entry in `after`."""

    @property
    def is_input(self) -> bool:
        """The target's artifact is read."""
        return bool(self.reads)

    @property
    def stage_path(self) -> FieldPath:
        """Path of the target's name."""
        return (*self.path, "stage") if self.is_input else self.path


@dataclass(frozen=True)
class DraftStage:
    """One entry of `spec.stages`; parts that could not be read are None."""

    path: FieldPath
    raw: Mapping[str, Any]
    name: str | None
    kind: str | None
    """None if there is no kind, or more than one."""
    makes: ArtifactType | None
    """The artifact of stages of this kind; None if the kind is."""
    config: Model | None
    """The kind's configuration; None if the schema rejects it."""
    links: tuple[Link, ...]

    def at(self, *steps: str | int) -> FieldPath:
        """Return the path of a field of this stage's configuration."""
        return (*self.path, self.kind or "", *steps)

    def raw_at(self, path: FieldPath) -> Mapping[str, Any]:
        """Return the mapping at a path below this stage, empty if there is none."""
        value: Any = self.raw
        for step in path[len(self.path) :]:
            value = value[step]
        return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Draft:
    """A run that may have faults."""

    document: Mapping[str, Any]
    stages: tuple[DraftStage, ...]
    makers: Mapping[ArtifactType, tuple[str, ...]] = field(default_factory=dict)
    """Kinds of stage by the artifact they make."""
    uri_fields: frozenset[str] = frozenset()
    """Names of fields that hold a URI."""

    @property
    def spec(self) -> Mapping[str, Any]:
        return _mapping(self.document.get("spec"))

    @property
    def storage(self) -> Mapping[str, Any]:
        return _mapping(self.spec.get("storage"))

    @property
    def by_name(self) -> dict[str, DraftStage]:
        """Stages by name; of several with one name the first."""
        stages: dict[str, DraftStage] = {}
        for stage in self.stages:
            if stage.name is not None:
                stages.setdefault(stage.name, stage)
        return stages


_PLAIN_NAME = re.compile(r"[a-z0-9][-a-z0-9]*")

Rule: TypeAlias = Callable[[Draft], Iterator[Fault]]
C = TypeVar("C", bound=Model)


def configs(draft: Draft, kind: type[C]) -> Iterator[tuple[DraftStage, C]]:
    """Yield the stages whose configuration is a `kind` and could be read."""
    for stage in draft.stages:
        if isinstance(stage.config, kind):
            yield stage, stage.config


def walk(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    """Yield a JSON value and everything below it with its path, in the document's order."""
    waiting: list[tuple[FieldPath, Any]] = [(path, value)]
    while waiting:
        place, here = waiting.pop()
        yield place, here
        if isinstance(here, Mapping):
            waiting += [((*place, name), item) for name, item in reversed(list(here.items()))]
        elif isinstance(here, list | tuple):
            waiting += [((*place, index), here[index]) for index in reversed(range(len(here)))]


def stage_names(document: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Return the names of a document's stages, in its order; None for one that does not identify its stage."""
    stages = _mapping(document.get("spec")).get("stages")
    names = [_mapping(stage).get("name") for stage in stages] if isinstance(stages, list | tuple) else []
    return tuple(
        name if isinstance(name, str) and _PLAIN_NAME.fullmatch(name) and names.count(name) == 1 else None
        for name in names
    )


def repeated_names(path: FieldPath, names: list[str]) -> Iterator[Fault]:
    """Yield a fault for every item of the list at `path` whose `name` an earlier item has."""
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Fault((*path, index, "name"), name, "must be unique in this list", "rename one of the two")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
