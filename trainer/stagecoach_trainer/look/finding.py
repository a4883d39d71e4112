"""What a look finds."""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach_api.fields import FieldPath


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or remarkable, about an input."""

    path: FieldPath
    """Of the field, below its stage: `("sft", "data", 0, "uri")`."""

    value: object
    """Value of the field."""

    rule: str
    remedy: str
    fatal: bool = True
    """The stage is certain to fail. Otherwise a warning."""

    @classmethod
    def from_error(cls, path: FieldPath, value: object, text: str, remedy: str) -> Finding:
        """Return the finding of a UserError, whose text ends with what to do after its last semicolon; if it does not,
        that is `remedy`."""
        rule, separator, end = text.rpartition("; ")
        return cls(path, value, rule, end) if separator else cls(path, value, text, remedy)
