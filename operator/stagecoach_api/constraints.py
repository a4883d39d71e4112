"""Constraints between the fields of one model, as expression trees.

A model declares each constraint once, in `Model.constraints`. Python evaluates the tree on an instance; the CRD has the
same tree as CEL (`stagecoach_api.schema.cel`). Fields are called by their Python names, nested ones as `batch.samples`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol, TypeAlias

from pydantic.alias_generators import to_camel

Constant: TypeAlias = str | int


class Predicate(Protocol):
    """A node of an expression tree."""

    def holds(self, model: object) -> bool:
        """Evaluate the tree on a model whose defaults are filled in."""

    def negated(self) -> Predicate:
        """Return the opposite, with negation only at the leaves."""

    def fields(self) -> Iterator[str]:
        """Yield the fields the tree reads."""


def value_at(model: object, field: str) -> object:
    """Return a field's value, None if the field or a model above it is unset."""
    for name in field.split("."):
        if model is None:
            return None
        model = getattr(model, name)
    return model


# -- leaves ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """An optional field is set. Fields with a default other than null cannot be tested: they always have a value."""

    field: str
    expected: bool = True

    def holds(self, model: object) -> bool:
        return (value_at(model, self.field) is not None) is self.expected

    def negated(self) -> Predicate:
        return Given(self.field, not self.expected)

    def fields(self) -> Iterator[str]:
        yield self.field


Operator: TypeAlias = Literal["==", "!=", ">=", "<"]
_OPPOSITES: dict[Operator, Operator] = {"==": "!=", "!=": "==", ">=": "<", "<": ">="}


@dataclass(frozen=True)
class Compare:
    """A field, or its default if it is unset, compares with a constant as stated."""

    field: str
    operator: Operator
    constant: Constant

    def holds(self, model: object) -> bool:
        return self.test(value_at(model, self.field))

    def test(self, value: object) -> bool:
        """Compare a value of the field. Raises TypeError for an order of values that have none."""
        match self.operator:
            case "==":
                return value == self.constant
            case "!=":
                return value != self.constant
        if not isinstance(value, int | float) or not isinstance(self.constant, int):
            raise TypeError(f"{self.field} {self.operator} {self.constant}: {value!r} is not numeric")
        return value >= self.constant if self.operator == ">=" else value < self.constant

    def negated(self) -> Predicate:
        return Compare(self.field, _OPPOSITES[self.operator], self.constant)

    def fields(self) -> Iterator[str]:
        yield self.field


@dataclass(frozen=True)
class Divisible:
    """A whole number is a multiple of another. Both fields must have a value where this is evaluated."""

    field: str
    divisor: str
    expected: bool = True

    def holds(self, model: object) -> bool:
        number, divisor = value_at(model, self.field), value_at(model, self.divisor)
        if not isinstance(number, int) or not isinstance(divisor, int):
            raise TypeError(f"{self.field} % {self.divisor}: {number!r} and {divisor!r} are not whole numbers")
        return (number % divisor == 0) is self.expected

    def negated(self) -> Predicate:
        return Divisible(self.field, self.divisor, not self.expected)

    def fields(self) -> Iterator[str]:
        yield from (self.field, self.divisor)


# -- combinations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllOf:
    """Every part holds."""

    parts: tuple[Predicate, ...]

    def holds(self, model: object) -> bool:
        return all(part.holds(model) for part in self.parts)

    def negated(self) -> Predicate:
        return AnyOf(tuple(part.negated() for part in self.parts))

    def fields(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.fields()


@dataclass(frozen=True)
class AnyOf:
    """At least one part holds; later parts are evaluated only if the earlier ones do not."""

    parts: tuple[Predicate, ...]

    def holds(self, model: object) -> bool:
        return any(part.holds(model) for part in self.parts)

    def negated(self) -> Predicate:
        return AllOf(tuple(part.negated() for part in self.parts))

    def fields(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.fields()


@dataclass(frozen=True)
class Same:
    """Both sides hold, or neither does; the opposite if not `expected`."""

    left: Predicate
    right: Predicate
    expected: bool = True

    def holds(self, model: object) -> bool:
        return (self.left.holds(model) == self.right.holds(model)) is self.expected

    def negated(self) -> Predicate:
        return Same(self.left, self.right, not self.expected)

    def fields(self) -> Iterator[str]:
        yield from self.left.fields()
        yield from self.right.fields()


@dataclass(frozen=True)
class Each:
    """The condition holds for every item of a list of models."""

    field: str
    condition: Predicate

    def holds(self, model: object) -> bool:
        items = value_at(model, self.field)
        if not isinstance(items, tuple):
            raise TypeError(f"{self.field}: {items!r} is not a list")
        return all(self.condition.holds(item) for item in items)

    def negated(self) -> Predicate:
        raise NotImplementedError(f"`not every item of {self.field}` has no use yet")

    def fields(self) -> Iterator[str]:
        yield self.field


@dataclass(frozen=True)
class Distinct:
    """No two items of a list of models have the same value of a field. Holds for a list that is unset."""

    field: str
    key: str

    def holds(self, model: object) -> bool:
        items = value_at(model, self.field)
        if items is None:
            return True
        if not isinstance(items, tuple):
            raise TypeError(f"{self.field}: {items!r} is not a list")
        keys = [value_at(item, self.key) for item in items]
        return len(set(keys)) == len(keys)

    def negated(self) -> Predicate:
        raise NotImplementedError(f"`two items of {self.field} are alike` has no use yet")

    def fields(self) -> Iterator[str]:
        yield self.field


@dataclass(frozen=True)
class ExactlyOne:
    """Exactly one of several optional fields is set."""

    members: tuple[str, ...]

    def holds(self, model: object) -> bool:
        return sum(value_at(model, member) is not None for member in self.members) == 1

    def negated(self) -> Predicate:
        raise NotImplementedError("`not exactly one` has no use yet")

    def fields(self) -> Iterator[str]:
        yield from self.members


# -- ways to write them ------------------------------------------------------------------------------------------------


def given(field: str) -> Predicate:
    return Given(field)


def missing(field: str) -> Predicate:
    return Given(field, expected=False)


def equals(field: str, constant: Constant) -> Predicate:
    return Compare(field, "==", constant)


def differs(field: str, constant: Constant) -> Predicate:
    return Compare(field, "!=", constant)


def at_least(field: str, constant: int) -> Predicate:
    return Compare(field, ">=", constant)


def divisible(field: str, divisor: str) -> Predicate:
    return Divisible(field, divisor)


def either(*parts: Predicate) -> Predicate:
    return AnyOf(parts)


def both(*parts: Predicate) -> Predicate:
    return AllOf(parts)


def implies(condition: Predicate, *consequences: Predicate) -> Predicate:
    """If `condition` holds, then at least one of `consequences` holds."""
    first = condition.negated()
    return AnyOf((*(first.parts if isinstance(first, AnyOf) else (first,)), *consequences))


def same(left: Predicate, right: Predicate) -> Predicate:
    return Same(left, right)


def different(left: Predicate, right: Predicate) -> Predicate:
    return Same(left, right, expected=False)


def each(field: str, condition: Predicate) -> Predicate:
    return Each(field, condition)


def distinct(field: str, key: str) -> Predicate:
    """Every item of a list has another value of its field `key`."""
    return Distinct(field, key)


def at_most_one(*members: str) -> Predicate:
    """At most one of several optional fields is set."""
    pairs = [AnyOf((Given(first, False), Given(second, False))) for first, second in combinations(members, 2)]
    return pairs[0] if len(pairs) == 1 else AllOf(tuple(pairs))


# -- constraints -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constraint:
    """A condition every instance of a model meets, with the one message for people and the API server."""

    condition: Predicate
    rule: str
    """What must hold, with the fields in backticks by their names in YAML."""
    remedy: str
    """What to do about it."""

    @property
    def message(self) -> str:
        return f"{self.rule}: {self.remedy}"


class ConstraintError(ValueError):
    """A model breaks one of its constraints."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        super().__init__(constraint.message)


def exactly_one(*members: str) -> Constraint:
    """Return the constraint that exactly one of several optional fields (Python names) is set."""
    listed = ", ".join(f"`{to_camel(member)}`" for member in members)
    return Constraint(ExactlyOne(members), f"give exactly one of {listed}", "add one, or remove the rest")
