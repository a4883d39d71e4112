"""The form every model of the contract has: frozen, closed, camelCase outside, documented fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """A frozen value that refuses unknown fields and speaks camelCase in YAML and JSON.

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


# Every string and list is bounded: CEL's cost budget counts the worst object (DESIGN section 5).
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
"""A name as Kubernetes has them (RFC 1123 label)."""

Identifier = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$")]
"""A name inside one stage, of a data set or a metric."""

Uri = Annotated[str, Field(min_length=1, max_length=1024)]
"""`s3://bucket/key`, `file:///folder` or a path relative to the run file."""

ShortText = Annotated[str, Field(max_length=256)]
LongText = Annotated[str, Field(max_length=65536)]
Pattern = Annotated[str, Field(min_length=1, max_length=1024)]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=10**15)]
NonNegativeCount = Annotated[int, Field(ge=0, le=10**15)]
Weight = Annotated[float, Field(ge=0.0, le=1e9)]
