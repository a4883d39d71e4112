"""The shape of models' fields, read from their annotations: shared by validation, overrides, CRD and reference.

The only unions in the API are `X | None`, so a field's shape is one of four.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from stagecoach_api.base import Model, constraints_of
from stagecoach_api.constraints import ExactlyOne

Step: TypeAlias = str | int
"""One step of a path: a field's name in YAML (camelCase) or an index."""
FieldPath: TypeAlias = tuple[Step, ...]


@dataclass(frozen=True)
class Shape:
    """A field's annotation without `Annotated` and `None`. At most one of `model`, `item`, `value` is set."""

    model: type[Model] | None = None
    """The model of a mapping with fixed fields."""
    item: Any = None
    """Annotation of a list's items."""
    value: Any = None
    """Annotation of the values of a mapping with free keys."""
    scalar: Any = None
    """The Python type of anything else."""
    optional: bool = False
    """None is an allowed value."""


def shape_of(annotation: Any) -> Shape:
    """Return the shape of an annotation such as `Annotated[tuple[Stage, ...], …] | None`."""
    annotation, optional = _strip(annotation)
    origin = get_origin(annotation)
    if origin is tuple or origin is list:
        return Shape(item=get_args(annotation)[0], optional=optional)
    if origin is dict:
        return Shape(value=get_args(annotation)[1], optional=optional)
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return Shape(model=annotation, optional=optional)
    return Shape(scalar=annotation, optional=optional)


def _strip(annotation: Any) -> tuple[Any, bool]:
    """Remove `Annotated`, type aliases and `None`."""
    optional = False
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            members = [member for member in get_args(annotation) if member is not type(None)]
            if len(members) != 1:
                return annotation, optional
            annotation, optional = members[0], True
        elif hasattr(annotation, "__value__"):
            annotation = annotation.__value__
        else:
            return annotation, optional


@cache
def fields_of(model: type[Model]) -> Mapping[str, FieldInfo]:
    """Return the fields of a model by their names in YAML."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def model_at(model: type[Model], path: Sequence[Step]) -> type[Model] | None:
    """Return the model at `path` below `model`; None if it is not a model or there is no such path."""
    annotation: Any = model
    for step in path:
        shape = shape_of(annotation)
        if shape.item is not None and isinstance(step, int):
            annotation = shape.item
        elif shape.value is not None:
            annotation = shape.value
        elif shape.model is not None and step in fields_of(shape.model):
            annotation = fields_of(shape.model)[str(step)].rebuild_annotation()
        else:
            return None
    return shape_of(annotation).model


def walk_models(*roots: type[Model]) -> Iterator[type[Model]]:
    """Yield every model below `roots` once, parents before children, in the order of the fields."""
    seen: dict[type[Model], None] = {}
    waiting = list(roots)
    while waiting:
        model = waiting.pop(0)
        if model in seen:
            continue
        seen[model] = None
        yield model
        waiting += [child for field in fields_of(model).values() if (child := _model_in(field.annotation)) is not None]


def walk_values(value: object, path: FieldPath = ()) -> Iterator[tuple[FieldPath, object]]:
    """Yield a model or a list, and everything below it, with its path below the first; other values end the walk."""
    yield path, value
    if isinstance(value, Model):
        for name, field in type(value).model_fields.items():
            yield from walk_values(getattr(value, name), (*path, field.alias or name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from walk_values(item, (*path, index))


def _model_in(annotation: Any) -> type[Model] | None:
    shape = shape_of(annotation)
    inner = shape.item if shape.item is not None else shape.value
    return shape.model or (_model_in(inner) if inner is not None else None)


def one_of_members(model: type[Model]) -> tuple[str, ...]:
    """Return the fields, by their names in YAML, of which exactly one must be set; none if there is no such rule."""
    for constraint in constraints_of(model):
        if isinstance(constraint.condition, ExactlyOne):
            return tuple(str(model.model_fields[name].alias) for name in constraint.condition.members)
    return ()


def format_path(path: Sequence[Step], stage_names: Sequence[str | None] = ()) -> str:
    """Format a path as in `stages.tune.sft.data[0].weight`, which `--set` takes as well.

    `stage_names`: of a run's stages, in the file's order. A stage without a name there keeps its index:
    `spec.stages[2].sft`.
    """
    text = ""
    match path:
        case ("spec", "stages", int(index), *rest) if index < len(stage_names) and stage_names[index] is not None:
            text, path = f"stages.{stage_names[index]}", rest
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text
