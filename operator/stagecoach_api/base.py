"""The base of every API model: frozen, closed, camelCase in YAML, documented fields, declared constraints."""

from __future__ import annotations

from functools import cache
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from stagecoach_api.constraints import Constraint, ConstraintError


class Model(BaseModel):
    """A frozen value that rejects unknown fields and has camelCase names in YAML and JSON.

    The docstring under a field becomes its description in the CRD and in `docs/reference.md`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    constraints: ClassVar[tuple[Constraint, ...]] = ()
    """Constraints this class adds to those of the classes it extends. Checked here and, as CEL, by the API server."""

    input_file: ClassVar[str | None] = None
    """Python name of a plain URI field whose file the stage reads: an input like a `Reference` with that `uri`."""

    @model_validator(mode="after")
    def _meets_its_constraints(self) -> Self:
        for constraint in constraints_of(type(self)):
            if not constraint.condition.holds(self):
                raise ConstraintError(constraint)
        return self


@cache
def constraints_of(model: type[Model]) -> tuple[Constraint, ...]:
    """Return a model's constraints, those of the classes it extends first."""
    owners = [owner for owner in reversed(model.__mro__) if issubclass(owner, Model)]
    return tuple(constraint for owner in owners for constraint in vars(owner).get("constraints", ()))


# Every string and list is bounded: the API server estimates the cost of a CEL rule for the largest allowed object.
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
"""A Kubernetes object name (RFC 1123 label)."""

Identifier = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$")]
"""The name of a data set or a metric within a stage."""

Uri = Annotated[str, Field(min_length=1, max_length=1024)]
"""`s3://bucket/key`, `file:///folder` or a path relative to the run file."""

ShortText = Annotated[str, Field(max_length=256)]
LongText = Annotated[str, Field(max_length=65536)]
Pattern = Annotated[str, Field(min_length=1, max_length=1024)]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=10**15)]
NonNegativeCount = Annotated[int, Field(ge=0, le=10**15)]
Weight = Annotated[float, Field(ge=0.0, le=1e9)]
