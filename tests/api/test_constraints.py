"""Constraints: one expression tree, evaluated in Python on models and by the API server, as CEL, on documents."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given as random
from hypothesis import settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stagecoach_api.base import Model, constraints_of
from stagecoach_api.constraints import (
    Constraint,
    Predicate,
    at_least,
    at_most_one,
    both,
    different,
    divisible,
    each,
    either,
    equals,
    exactly_one,
    given,
    implies,
    missing,
    same,
)
from stagecoach_api.fields import walk_models
from stagecoach_api.schema.cel import cel_of
from stagecoach_api.spec import TrainingRun
from tests.api.schema.cel import holds


class Inner(Model):
    """A nested model."""

    a: int | None = None
    b: int = 2


class Item(Model):
    """An item of a list."""

    weight: int | None = None


class Outer(Model):
    """A model with fields of every sort: required, optional, with a default, nested with and without one."""

    required: int
    word: str = "plain"
    count: int = 0
    flag: bool = False
    first: int | None = None
    second: int | None = None
    nested: Inner
    optional: Inner | None = None
    default: Inner = Inner()
    items: tuple[Item, ...]


BASE: dict[str, Any] = {"required": 6, "nested": {}, "items": []}


def outer(**fields: Any) -> dict[str, Any]:
    return {**BASE, **fields}


# (condition, its CEL, documents for which it holds, documents for which it does not)
CASES: list[tuple[Predicate, str, list[dict[str, Any]], list[dict[str, Any]]]] = [
    (given("first"), "has(self.first)", [outer(first=1)], [outer(), outer(first=None)]),
    (missing("first"), "!has(self.first)", [outer()], [outer(first=0)]),
    (given("nested.a"), "has(self.nested.a)", [outer(nested={"a": 1})], [outer()]),
    (
        given("optional.a"),
        "has(self.optional) && has(self.optional.a)",
        [outer(optional={"a": 1})],
        [outer(), outer(optional={})],
    ),
    (
        missing("default.a"),
        "!has(self.default) || !has(self.default.a)",
        [outer(), outer(default={})],
        [outer(default={"a": 1})],
    ),
    (equals("required", 6), "self.required == 6", [outer()], [outer(required=5)]),
    (
        equals("word", "plain"),
        "!has(self.word) || self.word == 'plain'",
        [outer(), outer(word="plain")],
        [outer(word="x")],
    ),
    (equals("word", "x"), "has(self.word) && self.word == 'x'", [outer(word="x")], [outer(), outer(word="plain")]),
    (equals("flag", True), "has(self.flag) && self.flag == true", [outer(flag=True)], [outer(), outer(flag=False)]),
    (at_least("count", 1), "has(self.count) && self.count >= 1", [outer(count=1)], [outer(), outer(count=0)]),
    (
        at_least("default.b", 2),
        "!has(self.default) || !has(self.default.b) || self.default.b >= 2",
        [outer(), outer(default={}), outer(default={"b": 2})],
        [outer(default={"b": 1})],
    ),
    (
        implies(equals("word", "x"), at_least("count", 3)),
        "!has(self.word) || self.word != 'x' || (has(self.count) && self.count >= 3)",
        [outer(), outer(word="y"), outer(word="x", count=3)],
        [outer(word="x"), outer(word="x", count=2)],
    ),
    (
        implies(given("first"), divisible("required", "first")),
        "!has(self.first) || self.required % self.first == 0",
        [outer(), outer(first=3)],
        [outer(first=4)],
    ),
    (
        implies(both(given("first"), given("second")), given("optional")),
        "!has(self.first) || !has(self.second) || has(self.optional)",
        [outer(), outer(first=1), outer(first=1, second=1, optional={})],
        [outer(first=1, second=1)],
    ),
    (
        implies(given("optional"), different(given("optional.a"), given("first"))),
        "!has(self.optional) || has(self.optional.a) != has(self.first)",
        [outer(), outer(optional={"a": 1}), outer(optional={}, first=1)],
        [outer(optional={}), outer(optional={"a": 1}, first=1)],
    ),
    (
        same(equals("required", 6), given("first")),
        "(self.required == 6) == has(self.first)",
        [outer(first=1), outer(required=5)],
        [outer(), outer(required=5, first=1)],
    ),
    (
        either(given("first"), each("items", given("weight"))),
        "has(self.first) || self.items.all(item, has(item.weight))",
        [outer(first=1, items=[{}]), outer(), outer(items=[{"weight": 0}])],
        [outer(items=[{"weight": 1}, {}])],
    ),
    (
        at_most_one("first", "second"),
        "!has(self.first) || !has(self.second)",
        [outer(), outer(first=1), outer(second=1)],
        [outer(first=1, second=1)],
    ),
    (
        exactly_one("first", "second").condition,
        "[has(self.first), has(self.second)].exists_one(given, given)",
        [outer(first=1), outer(second=1)],
        [outer(), outer(first=1, second=1)],
    ),
]


@pytest.mark.parametrize(("condition", "cel", "good", "bad"), CASES, ids=[case[1] for case in CASES])
def test_a_condition_means_the_same_in_python_and_in_cel(
    condition: Predicate, cel: str, good: list[dict[str, Any]], bad: list[dict[str, Any]]
) -> None:
    assert cel_of(condition, Outer) == cel
    for document in (*good, *bad):
        assert condition.holds(Outer.model_validate(document)) is (document in good), document
        assert holds(cel, document) is (document in good), document


LEAVES = st.sampled_from(
    [
        given("first"),
        given("nested.a"),
        given("optional"),
        given("optional.a"),
        missing("second"),
        missing("default.a"),
        equals("required", 2),
        equals("word", "plain"),
        equals("word", "x"),
        at_least("count", 1),
        at_least("required", 2),
        at_least("default.b", 2),
        divisible("required", "nested.b"),
        each("items", given("weight")),
        at_most_one("first", "second"),
    ]
)
NEGATABLE = LEAVES.filter(lambda leaf: "Each" not in type(leaf).__name__)
TREES: st.SearchStrategy[Predicate] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: either(*parts)),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: both(*parts)),
        st.tuples(NEGATABLE, inner).map(lambda pair: implies(*pair)),
        st.tuples(inner, inner).map(lambda pair: same(*pair)),
        st.tuples(inner, inner).map(lambda pair: different(*pair)),
    ),
    max_leaves=6,
)
DOCUMENTS = st.fixed_dictionaries(
    {
        "required": st.integers(0, 3),
        "nested": st.fixed_dictionaries({"b": st.just(2)}, optional={"a": st.integers(0, 2)}),
        "items": st.lists(st.fixed_dictionaries({}, optional={"weight": st.just(1)}), max_size=2),
    },
    optional={
        "word": st.sampled_from(["plain", "x", "y"]),
        "count": st.integers(0, 2),
        "first": st.none() | st.integers(1, 3),
        "second": st.integers(1, 3),
        "optional": st.fixed_dictionaries({}, optional={"a": st.integers(0, 2)}),
        "default": st.fixed_dictionaries({}, optional={"a": st.integers(0, 1), "b": st.integers(1, 3)}),
    },
)


@settings(max_examples=400, deadline=None)
@random(tree=TREES, document=DOCUMENTS)
def test_every_tree_agrees_with_its_cel_on_every_document(tree: Predicate, document: dict[str, Any]) -> None:
    """Python sees defaults filled in and CEL the fields that were written; an independent evaluator reads the CEL."""
    written = {name: value for name, value in document.items() if value is not None}  # the API server drops null
    assert tree.holds(Outer.model_validate(document)) is holds(cel_of(tree, Outer), written)


@settings(max_examples=200, deadline=None)
@random(leaf=NEGATABLE, document=DOCUMENTS)
def test_a_negated_condition_is_the_opposite(leaf: Predicate, document: dict[str, Any]) -> None:
    model = Outer.model_validate(document)
    assert leaf.negated().holds(model) is not leaf.holds(model)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (given("count"), "`count` has a default"),
        (given("default.b"), "`default.b` has a default"),
        (each("items", given("nothing")), "nothing"),
        (given("required.a"), "`required` is not a model"),
    ],
)
def test_a_condition_that_cel_cannot_express_faithfully_stops_the_generator(condition: Predicate, words: str) -> None:
    with pytest.raises((ValueError, KeyError), match=words):
        cel_of(condition, Outer)


def test_a_default_that_depends_on_the_model_above_stops_the_generator() -> None:
    class Above(Model):
        """A model whose default sets a nested field to another value than that field's own default."""

        inner: Inner = Inner(b=5)

    with pytest.raises(ValueError, match=r"`inner\.b` has another default"):
        cel_of(at_least("inner.b", 3), Above)


# -- models ------------------------------------------------------------------------------------------------------------


class Base(Model):
    """A model with a constraint."""

    constraints = (Constraint(given("first"), "`first` is needed", "give it"),)

    first: int | None = None


class Extended(Base):
    """A model with one more."""

    constraints = (exactly_one("second", "third_one"),)

    second: int | None = None
    third_one: int | None = None


def test_a_model_has_the_constraints_of_the_models_it_extends_first() -> None:
    assert [item.message for item in constraints_of(Extended)] == [
        "`first` is needed: give it",
        "give exactly one of `second`, `thirdOne`: add one, or remove the rest",
    ]


def test_a_model_that_breaks_a_constraint_cannot_be_made() -> None:
    with pytest.raises(ValidationError, match="`first` is needed: give it"):
        Extended(second=1)
    with pytest.raises(ValidationError, match="give exactly one of `second`, `thirdOne`"):
        Extended(first=1)
    assert Extended(first=1, third_one=2).third_one == 2


def test_every_constraint_of_the_api_can_be_written_as_cel() -> None:
    found = [
        cel_of(constraint.condition, model)
        for model in walk_models(TrainingRun)
        for constraint in constraints_of(model)
    ]
    assert len(found) >= 31
