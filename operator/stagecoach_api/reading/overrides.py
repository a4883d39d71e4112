"""`--set stages.sft.optimizer.learningRate=2e-5`: change a field of a run without editing its file."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from stagecoach_api.fields import FieldPath, Shape, fields_of, shape_of
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.problems import MISSING, InvalidRun, Problem, suggest
from stagecoach_api.reading.yaml_reader import read_yaml
from stagecoach_api.spec import Stage, TrainingRun

_SEGMENT = re.compile(r"\.|\[(\d+)\]")


class _Unknown(Exception):
    def __init__(self, rule: str, remedy: str) -> None:
        self.rule, self.remedy = rule, remedy
        super().__init__(rule)


@dataclass(frozen=True)
class Override:
    """One parsed `--set`."""

    text: str
    """As it was given: `PATH=VALUE`."""
    segments: tuple[str, ...]
    value: Any

    @property
    def source(self) -> str:
        return f"--set {self.text}"


def parse_override(text: str) -> Override:
    """Parse `PATH=VALUE`; the value is YAML. Raises `InvalidRun`."""
    path, equals, value = text.partition("=")
    segments = tuple(segment for segment in _SEGMENT.split(path.strip()) if segment)
    if not equals or not segments:
        problem = Problem("", MISSING, "must be PATH=VALUE", "write `--set seed=1`", None, f"--set {text}")
        raise InvalidRun([problem])
    return Override(text, segments, _parse_value(value, f"--set {text}") if value.strip() else None)


def _parse_value(text: str, source: str) -> Any:
    try:
        read = read_yaml(text, source)
    except InvalidRun as error:
        raise InvalidRun(replace(problem, line=None) for problem in error.problems) from None
    if read.problems:
        raise InvalidRun(replace(problem, line=None) for _, problem in read.problems)
    return read.value


def apply_overrides(document: dict[str, Any], texts: Sequence[str]) -> tuple[dict[str, Any], dict[FieldPath, str]]:
    """Return the document with every override set, and where each changed path's value came from.

    Raises `InvalidRun` with every override that matches no field.
    """
    document = copy.deepcopy(document)
    sources: dict[FieldPath, str] = {}
    problems: list[Problem] = []
    for text in texts:
        try:
            override = parse_override(text)
            sources[_apply(document, override)] = override.source
        except InvalidRun as error:
            problems += error.problems
    if problems:
        raise InvalidRun(problems)
    return document, sources


def _apply(document: dict[str, Any], override: Override) -> FieldPath:
    try:
        path = _resolve(document, override.segments)
        _put(document, path, override.value)
    except _Unknown as error:
        where = ".".join(override.segments)
        raise InvalidRun([Problem(where, override.value, error.rule, error.remedy, None, override.source)]) from None
    return path


# -- from the text of an override to a path in the document -----------------------------------------------------------


def _resolve(document: dict[str, Any], segments: tuple[str, ...]) -> FieldPath:
    """Return the full path; `spec` may be left out, stages go by name, and a stage's kind may be left out."""
    first = segments[0]
    if first == "metadata":
        return _typed_path(shape_of(TrainingRun), segments, document)
    if first == "spec":
        segments = segments[1:]
        if not segments:
            raise _Unknown("names all of the spec", "name one field of it")
    if segments[0] != "stages":
        return _typed_path(shape_of(TrainingRun), ("spec", *segments), document)
    return _resolve_stage(document, segments[1:])


def _resolve_stage(document: dict[str, Any], segments: tuple[str, ...]) -> FieldPath:
    spec = document.get("spec")
    stages = spec.get("stages") if isinstance(spec, dict) else None
    stages = stages if isinstance(stages, list) else []
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    if not segments:
        raise _Unknown("names no stage", f"write stages.NAME.FIELD with one of {', '.join(map(str, names))}")
    index = _stage_index(segments[0], names)
    rest = segments[1:]
    if not rest:
        raise _Unknown("names a whole stage", "name one field of it")
    stage = stages[index] if isinstance(stages[index], dict) else {}
    return ("spec", "stages", index, *_typed_path(shape_of(Stage), _with_kind(stage, rest), stage))


def _stage_index(segment: str, names: list[Any]) -> int:
    if segment in names:
        return names.index(segment)
    if segment.isdigit() and int(segment) < len(names):
        return int(segment)
    known = [str(name) for name in names if name is not None]
    raise _Unknown(f"`{segment}` is not a stage of this run", suggest(segment, known))


def _with_kind(stage: dict[str, Any], segments: tuple[str, ...]) -> tuple[str, ...]:
    """Prepend the stage's kind if the field belongs to its configuration."""
    kinds = [kind for kind in STAGE_KINDS if stage.get(kind) is not None]
    if len(kinds) != 1:
        return segments
    kind, first = kinds[0], segments[0]
    config = fields_of(STAGE_KINDS[kind].config)
    # A stage has both `tokenizer` (a kind) and `sft.tokenizer`, both `data` (a kind) and `sft.data`: in an `sft` stage
    # the other kinds cannot be meant.
    if first in config and (first not in fields_of(Stage) or (first in STAGE_KINDS and first != kind)):
        return (kind, *segments)
    if first in fields_of(Stage):
        return segments
    allowed = [*config, *(name for name in fields_of(Stage) if name == kind or name not in STAGE_KINDS)]
    raise _Unknown(f"`{first}` is not a field of this {kind} stage", suggest(first, allowed))


def _typed_path(shape: Shape, segments: tuple[str, ...], value: Any) -> FieldPath:
    """Check each segment against the models; lists take indexes."""
    path: list[str | int] = []
    for segment in segments:
        if shape.model is not None:
            fields = fields_of(shape.model)
            if segment not in fields:
                raise _Unknown(f"`{segment}` is not a field of {shape.model.__name__}", suggest(segment, list(fields)))
            path.append(segment)
            shape = shape_of(fields[segment].annotation)
        elif shape.item is not None:
            path.append(_list_index(segment, value))
            shape = shape_of(shape.item)
        elif shape.value is not None:
            path.append(segment)
            shape = shape_of(shape.value)
        else:
            raise _Unknown(f"`{path[-1]}` is a single value and has no `{segment}`", "shorten the path")
        value = _child(value, path[-1])
    return tuple(path)


def _list_index(segment: str, value: Any) -> int:
    """An index of the list, or one past its end, which adds an item."""
    length = len(value) if isinstance(value, list) else 0
    if not segment.isdigit() or int(segment) > length:
        raise _Unknown(f"`{segment}` is not an index of a list of {length}", f"write a number from 0 to {length}")
    return int(segment)


def _child(value: Any, step: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


# -- writing -----------------------------------------------------------------------------------------------------------


def _put(document: dict[str, Any], path: FieldPath, value: Any) -> None:
    """Set the value, creating the mappings and lists above it that are missing."""
    here: Any = document
    for step, following in pairwise(path):
        child = _child(here, step)
        if not isinstance(child, dict | list):
            child = [] if isinstance(following, int) else {}
            _set(here, step, child)
        here = child
    _set(here, path[-1], value)


def _set(container: Any, step: str | int, value: Any) -> None:
    if isinstance(container, list) and isinstance(step, int) and step == len(container):
        container.append(value)
    elif isinstance(container, list) != isinstance(step, int):
        raise _Unknown(f"the run has no place for `{step}`", "correct the file first")
    else:
        container[step] = value
