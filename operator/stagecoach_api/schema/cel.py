"""Constraints as CEL, the language of the API server's validation rules.

CEL sees the object as it was written, while Python's models have their defaults filled in. So a field that may be
unset is tested with `has()` first, and what its default would give decides between `has(x) && …` and `!has(x) || …`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from stagecoach_api.base import Model
from stagecoach_api.constraints import (
    AllOf,
    AnyOf,
    Compare,
    Constant,
    Distinct,
    Divisible,
    Each,
    ExactlyOne,
    Given,
    Predicate,
    Same,
    value_at,
)
from stagecoach_api.fields import shape_of


def cel_of(condition: Predicate, model: type[Model]) -> str:
    """Return a condition on `model` as a CEL expression on `self`.

    Raises ValueError for a condition that would mean something else in CEL than in Python.
    """
    return _Scope("self", model).expression(condition).text


class _Binding(IntEnum):
    """How strongly the outermost operator of an expression binds."""

    OR = 1
    AND = 2
    RELATION = 3
    ATOM = 4


@dataclass(frozen=True)
class _Expression:
    text: str
    binding: _Binding

    def inside(self, binding: _Binding) -> str:
        """Return the text as an operand, in parentheses unless it binds at least as strongly as `binding`."""
        return self.text if self.binding >= binding else f"({self.text})"


def _any(parts: Sequence[_Expression]) -> _Expression:
    # CEL needs no parentheses around && in ||; they are written for people.
    texts = [part.text if part.binding is _Binding.OR else part.inside(_Binding.RELATION) for part in parts]
    return _Expression(" || ".join(texts), _Binding.OR) if len(parts) > 1 else parts[0]


def _all(parts: Sequence[_Expression]) -> _Expression:
    texts = [part.inside(_Binding.AND) for part in parts]
    return _Expression(" && ".join(texts), _Binding.AND) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class _Scope:
    """Where a condition is evaluated."""

    variable: str
    """CEL's name of the object: `self`, or the item of a list."""
    model: type[Model]
    known: frozenset[str] = frozenset()
    """Fields that are set wherever this part of the expression is evaluated."""

    def expression(self, condition: Predicate) -> _Expression:  # noqa: PLR0911 - one line for each kind of node
        match condition:
            case Given():
                return self._given(condition)
            case Compare():
                return self._compare(condition)
            case Divisible(field=field, divisor=divisor, expected=expected):
                remainder = f"{self._path(field)} % {self._path(divisor)}"
                return _Expression(f"{remainder} {_equality(expected)} 0", _Binding.RELATION)
            case AllOf(parts=parts):
                return _all(self._parts(parts, set_by=True))
            case AnyOf(parts=parts):
                return _any(self._parts(parts, set_by=False))
            case Same(left=left, right=right, expected=expected):
                sides = [self.expression(side).inside(_Binding.ATOM) for side in (left, right)]
                return _Expression(f" {_equality(expected)} ".join(sides), _Binding.RELATION)
            case Each(field=field, condition=inner):
                item = self._item(field).expression(inner).text
                return _Expression(f"{self._path(field)}.all(item, {item})", _Binding.ATOM)
            case Distinct(field=field, key=key):
                items = self._path(field)
                alone = f"{items}.all(one, {items}.exists_one(other, other.{to_camel(key)} == one.{to_camel(key)}))"
                return _any([_tests([self._has(field)], expected=False), _Expression(alone, _Binding.ATOM)])
            case ExactlyOne(members=members):
                given = ", ".join(self._has(member) for member in members)
                return _Expression(f"[{given}].exists_one(given, given)", _Binding.ATOM)
        raise ValueError(f"{condition} has no form in CEL")

    def _parts(self, parts: Sequence[Predicate], set_by: bool) -> list[_Expression]:
        """Return the operands of && (`set_by` true) or ||. CEL evaluates a later one only if the earlier ones were true
        or, for ||, false; so a field whose `has()` they tested needs no second test."""
        expressions, scope = [], self
        for part in parts:
            expressions.append(scope.expression(part))
            if isinstance(part, Given) and part.expected is set_by:
                scope = replace(scope, known=scope.known | {part.field})
        return expressions

    def _given(self, condition: Given) -> _Expression:
        if self._default(condition.field) is not None:
            raise ValueError(f"`{condition.field}` has a default: it is always set in Python and not always in CEL")
        return _tests([*self._guards(condition.field), self._has(condition.field)], condition.expected)

    def _compare(self, condition: Compare) -> _Expression:
        comparison = f"{self._path(condition.field)} {condition.operator} {_literal(condition.constant)}"
        guards = self._guards(condition.field)
        if not self._field(condition.field).is_required():
            guards.append(self._has(condition.field))
        relation = _Expression(comparison, _Binding.RELATION)
        if not guards:
            return relation
        if condition.test(self._default(condition.field)):
            return _any([_tests(guards, expected=False), relation])
        return _all([_tests(guards, expected=True), relation])

    # -- fields

    def _path(self, field: str) -> str:
        names, model = [self.variable], self.model
        for name in field.split("."):
            info = model.model_fields[name]
            names.append(info.alias or name)
            model = shape_of(info.annotation).model or model
        return ".".join(names)

    def _has(self, field: str) -> str:
        return f"has({self._path(field)})"

    def _guards(self, field: str) -> list[str]:
        """Return a `has()` for every optional model above a nested field that is not known to be set."""
        names = field.split(".")
        above = [".".join(names[: number + 1]) for number in range(len(names) - 1)]
        return [self._has(path) for path in above if path not in self.known and not self._field(path).is_required()]

    def _field(self, field: str) -> FieldInfo:
        *above, last = field.split(".")
        model = self.model
        for name in above:
            inner = shape_of(model.model_fields[name].annotation).model
            if inner is None:
                raise ValueError(f"`{field}`: `{name}` is not a model")
            model = inner
        return model.model_fields[last]

    def _default(self, field: str) -> object:
        """Return the value a field has if it, or an optional model above it, is unset."""
        names = field.split(".")
        found = []
        for number in range(1, len(names) + 1):
            info = self._field(".".join(names[:number]))
            if not info.is_required():
                default = info.get_default(call_default_factory=True)
                found.append(value_at(default, ".".join(names[number:])) if number < len(names) else default)
        if any(default != found[0] for default in found):
            raise ValueError(f"`{field}` has another default where a model above it is unset: {found}")
        return found[0] if found else None

    def _item(self, field: str) -> _Scope:
        info = self._field(field)
        item = shape_of(shape_of(info.annotation).item).model
        if item is None or not info.is_required():
            raise ValueError(f"`{field}` must be a required list of models")
        return _Scope("item", item)


def _literal(constant: Constant) -> str:
    """Return a constant as CEL writes it: its texts are in quotes, its `true` is in lower case."""
    if isinstance(constant, str):
        return f"'{constant}'"
    return str(constant).lower() if isinstance(constant, bool) else str(constant)


def _equality(expected: bool) -> str:
    return "==" if expected else "!="


def _tests(guards: Sequence[str], expected: bool) -> _Expression:
    """Return that all `has()` are true, or that one of them is not."""
    if expected:
        return _all([_Expression(guard, _Binding.ATOM) for guard in guards])
    return _any([_Expression(f"!{guard}", _Binding.ATOM) for guard in guards])
