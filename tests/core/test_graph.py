"""The graph: order, cycles, missing inputs."""

from __future__ import annotations

import pytest

from stagecoach_core.graph import GraphError, ancestors, nearest_name, topological_order


def test_every_stage_comes_after_those_it_needs() -> None:
    order = topological_order({"score": ["sft"], "sft": ["corpus", "base"], "base": ["corpus"], "corpus": []})
    assert order == ("corpus", "base", "sft", "score")


def test_ties_keep_the_order_of_the_file() -> None:
    assert topological_order({"b": [], "c": [], "a": []}) == ("b", "c", "a")
    assert topological_order({"b": [], "late": ["a"], "c": [], "a": []}) == ("b", "c", "a", "late")


def test_a_cycle_is_named_and_stages_outside_it_are_not() -> None:
    with pytest.raises(GraphError) as caught:
        topological_order({"free": [], "a": ["b"], "b": ["c", "free"], "c": ["a"], "behind": ["a"]})
    assert caught.value.problems == (
        "the stages form a cycle: a → b → c → a (each needs the next); remove one of these inputs",
    )


def test_a_stage_that_needs_itself_is_named() -> None:
    with pytest.raises(GraphError, match="stage `a` needs itself"):
        topological_order({"a": ["a"]})


def test_all_missing_inputs_are_named_with_the_nearest_name() -> None:
    with pytest.raises(GraphError) as caught:
        topological_order({"corpus": [], "sft": ["corpsu"], "score": ["xyz"]})
    assert caught.value.problems == (
        "stage `sft` needs stage `corpsu`, which does not exist; did you mean `corpus`?",
        "stage `score` needs stage `xyz`, which does not exist; there are `corpus`, `sft`, `score`",
    )


def test_ancestors_follow_all_edges() -> None:
    upstream = {"a": [], "b": ["a"], "c": ["b"], "d": ["a"]}
    assert ancestors(["c"], upstream) == {"a", "b"}
    assert ancestors(["a"], upstream) == frozenset()


def test_a_name_similar_to_none_has_no_nearest_name() -> None:
    assert nearest_name("corpsu", ["corpus", "sft"]) == "corpus"
    assert nearest_name("zzz", ["corpus", "sft"]) is None
