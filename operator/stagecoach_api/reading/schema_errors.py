"""Pydantic's errors as problems, in terms of the run file, with the field that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from stagecoach_api.base import Model
from stagecoach_api.constraints import ConstraintError, ExactlyOne
from stagecoach_api.fields import FieldPath, fields_of, format_path, model_at, shape_of
from stagecoach_api.pods import CPU_PATTERN, MEMORY_PATTERN, MIN_BYTES, QUANTITY_PATTERN
from stagecoach_api.problems import MISSING, Problem, suggest
from stagecoach_api.references import Reference

Wording = Callable[[type[Model], ErrorDetails], tuple[str, str]]
"""Converts the error of a field below a root model into (rule, remedy)."""


def schema_problems(root: type[Model], error: ValidationError) -> list[tuple[FieldPath, Problem]]:
    """Return the problems of a validation error, each with its path, without those that only follow from others."""
    found = [(detail["loc"], _problem(root, detail)) for detail in error.errors(include_url=False)]
    details = error.errors(include_url=False)
    return [pair for pair, detail in zip(found, details, strict=True) if not _follows_from_others(detail)]


def _follows_from_others(detail: ErrorDetails) -> bool:
    """Pydantic also reports a list with invalid items as too short, because no item was left."""
    value = detail["input"]
    return detail["type"] == "too_short" and isinstance(value, list) and len(value) >= detail["ctx"]["min_length"]


def _problem(root: type[Model], detail: ErrorDetails) -> Problem:
    wording = _WORDINGS.get(detail["type"], _other)
    rule, remedy = wording(root, detail)
    return Problem(format_path(detail["loc"]), _value(root, detail), rule, remedy)


def _value(root: type[Model], detail: ErrorDetails) -> Any:
    """Return the value to report: of a mapping that breaks a constraint, the fields the constraint names."""
    if detail["type"] == "missing":
        return MISSING
    value, error = detail["input"], detail.get("ctx", {}).get("error")
    model = model_at(root, detail["loc"])
    if not isinstance(error, ConstraintError) or not isinstance(value, Mapping) or model is None:
        return value
    names = {str(model.model_fields[path.split(".")[0]].alias) for path in error.constraint.condition.fields()}
    return {name: item for name, item in value.items() if name in names}


def _owner(root: type[Model], detail: ErrorDetails) -> type[Model]:
    return model_at(root, detail["loc"][:-1]) or root


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split()).split(". ")[0].split(": ")[0].rstrip(".")


# -- wordings, one per kind of error -----------------------------------------------------------------------------------


def _missing(root: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    name = str(detail["loc"][-1])
    field = fields_of(_owner(root, detail)).get(name)
    about = f" ({_first_sentence(field.description)})" if field is not None and field.description else ""
    return "is required", f"add `{name}`{about}"


def _unknown_field(root: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    owner, name = _owner(root, detail), str(detail["loc"][-1])
    fields = list(fields_of(owner))
    if not fields:
        return f"`{name}` is not a field of {owner.__name__}, which has none", "remove it"
    return f"`{name}` is not a field of {owner.__name__}", suggest(name, fields)


def _enum(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
    if isinstance(detail["input"], str):
        return f"must be one of {', '.join(allowed)}", suggest(detail["input"], allowed)
    return f"must be one of {', '.join(allowed)}", "leave the field out to take its default, or write one of these"


def _literal(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    allowed = detail["ctx"]["expected"].strip("'")
    return f"must be {allowed}", f"write `{allowed}`"


def _bound(words: str, key: str) -> Wording:
    def wording(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
        limit = detail["ctx"][key]
        shown = f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
        return f"must be {words} {shown}", f"write a number {words} {shown}"

    return wording


def _not_a_number(_: type[Model], __: ErrorDetails) -> tuple[str, str]:
    return "must be a finite number", "write one without `.inf` or `.nan`"


def _scalar(name: str, example: str) -> Wording:
    def wording(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
        value, rule = detail["input"], f"must be {name}"
        if value is None:
            return rule, "leave the field out, or give it a value"
        if isinstance(value, str) and name != "a string":
            return rule, f"write it without quotes, such as {example}"
        return rule, f"write {name}, such as {example}"

    return wording


def _string(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    value = detail["input"]
    if isinstance(value, (bool, int, float)):
        return "must be a string", "put it in quotes"
    return "must be a string", "leave the field out, or give one string"


def _length(words: str, key: str, unit: str) -> Wording:
    def wording(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
        limit = detail["ctx"][key]
        units = unit if limit == 1 else f"{unit}s"
        return f"must have {words} {limit:,} {units}", f"give it {words} {limit:,}"

    return wording


_PATTERNS = {
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": "lower-case letters, digits and `-`, with a letter or digit at both ends",
    r"^[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$": "letters, digits, `-`, `_` and `.`, a letter or digit at both ends",
    QUANTITY_PATTERN: "a Kubernetes quantity, such as `96`, `500m` or `1000Gi`",
    CPU_PATTERN: "a number of CPUs above 0, such as `4` or `500m`",
    MEMORY_PATTERN: "an amount of memory with its unit, such as `64Gi` (`m` is a thousandth; a number without a unit "
    f"means bytes, at least {MIN_BYTES:,})",
}


def _pattern(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    pattern = detail["ctx"]["pattern"]
    words = _PATTERNS.get(pattern, f"text that matches `{pattern}`")
    return f"must be {words}", "change it to that form"


def _mapping(root: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    model, value = model_at(root, detail["loc"]), detail["input"]
    if model is not None and issubclass(model, Reference) and isinstance(value, str):
        return "must name its input", f"write `{{stage: {value}}}` or `{{uri: {value}}}`"
    if value is None:
        return "must be a mapping, and is empty", "leave the field out, or write `{}` for its defaults"
    fields = f" with the fields {', '.join(fields_of(model))}" if model is not None else ""
    return "must be a mapping", f"write a mapping{fields}"


def _list(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    if detail["input"] is None:
        return "must be a list, and is empty", "leave the field out, or write `[]`"
    return "must be a list", "write it as a list, each item after a `- `"


def _model_rule(root: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    """Return the rule and the remedy of a broken constraint between fields of a model."""
    error, value = detail["ctx"]["error"], detail["input"]
    if not isinstance(error, ConstraintError):
        return str(error), "change one of the fields the rule names"
    constraint = error.constraint
    model = model_at(root, detail["loc"])
    if not isinstance(constraint.condition, ExactlyOne) or not isinstance(value, Mapping) or model is None:
        return constraint.rule, constraint.remedy
    members = [str(model.model_fields[name].alias) for name in constraint.condition.members]
    return f"must have exactly one of {', '.join(members)}", _one_of_remedy(model, value, members)


def _one_of_remedy(model: type[Model], value: Mapping[str, Any], members: list[str]) -> str:
    given = [name for name in members if value.get(name) is not None]
    empty = [name for name in members if name in value and value[name] is None]
    if given:
        return f"keep one of {', '.join(given)} and remove the rest"
    if empty and shape_of(fields_of(model)[empty[0]].annotation).model is not None:
        return f"`{empty[0]}` is empty: write `{empty[0]}: {{}}` for its defaults"
    return "add one of them"


def _other(_: type[Model], detail: ErrorDetails) -> tuple[str, str]:
    return detail["msg"], "correct the value"


_WORDINGS: dict[str, Wording] = {
    "missing": _missing,
    "extra_forbidden": _unknown_field,
    "enum": _enum,
    "literal_error": _literal,
    "greater_than_equal": _bound("at least", "ge"),
    "less_than_equal": _bound("at most", "le"),
    "finite_number": _not_a_number,
    "int_type": _scalar("a whole number", "`8`"),
    "float_type": _scalar("a number", "`0.1`"),
    "bool_type": _scalar("true or false", "`true`"),
    "string_type": _string,
    "string_too_short": _length("at least", "min_length", "character"),
    "string_too_long": _length("at most", "max_length", "character"),
    "too_short": _length("at least", "min_length", "item"),
    "too_long": _length("at most", "max_length", "item"),
    "string_pattern_mismatch": _pattern,
    "tuple_type": _list,
    "model_type": _mapping,
    "dict_type": _mapping,
    "value_error": _model_rule,
}
