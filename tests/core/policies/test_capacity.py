"""Capacity: which ready stages fit."""

from __future__ import annotations

import pytest

from stagecoach_api.spec import Resources
from stagecoach_core.policies.capacity import describe_limits, num_ranks, select_fitting
from stagecoach_core.values import Capacity

RANKS = {"a": 1, "b": 2, "c": 1, "huge": 16}


@pytest.mark.parametrize(
    ("ready", "occupying", "capacity", "started"),
    [
        pytest.param("abc", "", Capacity(), "abc", id="without limits all start"),
        pytest.param("abc", "", Capacity(slots=2), "ab", id="as many as there are slots"),
        pytest.param("bc", "a", Capacity(slots=2), "b", id="running stages hold their slots"),
        pytest.param("abc", "", Capacity(ranks=2), "ac", id="a smaller stage passes a larger one that does not fit"),
        pytest.param("b", "a", Capacity(ranks=2), "", id="ranks of running stages count"),
        pytest.param("ab", "", Capacity(slots=0), "a", id="there is always one slot"),
    ],
)
def test_fitting(ready: str, occupying: str, capacity: Capacity, started: str) -> None:
    assert select_fitting(list(ready), list(occupying), RANKS, capacity) == list(started)


def test_a_stage_larger_than_the_machine_runs_alone() -> None:
    capacity = Capacity(ranks=2)
    assert select_fitting(["huge", "a"], [], RANKS, capacity) == ["huge"]
    assert select_fitting(["huge"], ["a"], RANKS, capacity) == []


def test_ranks_are_gpus_or_processes_of_all_nodes() -> None:
    assert num_ranks(Resources()) == 1
    assert num_ranks(Resources(nodes=2, gpus_per_node=8, ranks_per_node=3)) == 16
    assert num_ranks(Resources(nodes=2, gpus_per_node=0, ranks_per_node=3)) == 6


def test_the_limits_are_named() -> None:
    assert describe_limits(Capacity(slots=1, ranks=4)) == "capacity: this machine has 1 slot and 4 ranks"
    assert describe_limits(Capacity()) == "capacity"
