"""Whatever is in a status, a turn does not raise."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stagecoach_operator.kube import TRAINING_RUNS
from tests.operator.makers import Ends, Operator, World, data_stage, drive

ODD = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    st.sampled_from([10**9, 10**15, -1, "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+23:00", "d" * 64, "preemption"]),
    st.recursive(st.none() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in places(item, (*path, key)))]


def put(status: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    holder = status
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    return status


STATUSES: list[dict[str, Any]] = []
"""Statuses of a real run, at several times."""


def statuses() -> list[dict[str, Any]]:
    if STATUSES:
        return STATUSES
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.input("a.txt")
        world.ends["b"] = [Ends(-9, "infrastructure", "killed")] * 12
        world.submit(data_stage("a"), data_stage("b", "a"))

        async def scenario() -> None:
            operator = Operator(world)
            for _ in range(3):
                await drive(world, operator, 300)
                body = world.api.objects[TRAINING_RUNS.plural, "team", "demo"]
                STATUSES.append(json.loads(json.dumps(body["status"])))
                world.holds.add("b")
            operator.die()

        asyncio.run(scenario())
    return STATUSES


@given(data=st.data())
@settings(max_examples=25, deadline=None, phases=[Phase.generate])
def test_no_value_anywhere_in_a_status_makes_a_turn_raise(data: st.DataObject) -> None:
    status = copy.deepcopy(data.draw(st.sampled_from(statuses())))
    for _ in range(data.draw(st.integers(1, 2))):
        status = put(status, data.draw(st.sampled_from(places(status))), data.draw(ODD))
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.input("a.txt")
        world.holds |= {"a", "b"}
        world.submit(data_stage("a"), data_stage("b", "a"))
        world.api.objects[TRAINING_RUNS.plural, "team", "demo"]["status"] = status

        async def scenario() -> None:
            operator = Operator(world)
            await drive(world, operator, 20)
            operator.die()

        asyncio.run(scenario())
