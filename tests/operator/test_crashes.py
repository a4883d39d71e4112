"""Kills of the operator before or after any write, and failing writes: nothing runs twice, nothing stalls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecoach_api.status import StageState
from stagecoach_operator.kube import Conflict, Invalid, Unavailable
from tests.operator.makers import START, Ends, Killed, Operator, World, data_stage, drive

pytestmark = pytest.mark.slow

STAGES = (data_stage("a"), data_stage("b", "a"), data_stage("c", "b", resources={"nodes": 2}))


def new_world(folder: Path) -> World:
    """A run of three stages whose second one fails once."""
    world = World(folder)
    world.input("a.txt")
    world.ends["b"] = [Ends(-9, "infrastructure", "killed")]
    world.submit(*STAGES)
    return world


async def work_through(world: World) -> int:
    """Drive the world with one operator after another; return how many were needed."""
    for operators in range(1, 10):
        operator = Operator(world)
        try:
            await drive(world, operator)
        except Killed:
            operator.die()
            continue
        operator.die()
        return operators
    raise AssertionError("no operator finished the run")


def number_of_writes(folder: Path) -> int:
    world = new_world(folder)
    asyncio.run(work_through(world))
    return len(world.api.writes)


def check(world: World) -> None:
    assert [stage.state for stage in world.status().stages] == [StageState.SUCCEEDED] * 3
    assert world.two_at_once == [], "two pods 0 of a stage ran at once"
    made = [name.rsplit("-", 1)[0] for name in world.pods_made]
    assert {name: made.count(name) for name in set(made)} == {made[0]: 1, made[1]: 2, made[3]: 2}
    assert world.stage("b").restarts.infrastructure == 1
    assert world.now - START < 60, "the run stalled"
    assert world.run().finalizers == ()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_any_write_changes_nothing(when: str, tmp_path: Path) -> None:
    writes = number_of_writes(tmp_path / "undisturbed")
    assert writes >= 17
    for at in range(writes):
        world = new_world(tmp_path / f"{when}-{at}")

        def kill(number: int, what: str, at: int = at, world: World = world) -> None:
            if number == at and not getattr(world, "killed", False):
                world.killed = True  # type: ignore[attr-defined]
                raise Killed(what)

        if when == "before":
            world.api.before_write = kill
        else:
            world.api.after_write = kill
        operators = asyncio.run(work_through(world))
        assert operators == 2, f"write {at} of {writes}"
        check(world)


REFUSED: dict[str, Callable[[], Exception]] = {
    "429": lambda: Unavailable("429: too many requests", retry_after=1.0),
    "500": lambda: Unavailable("500: internal error"),
    "409": lambda: Conflict("the object has been modified"),
    "422": lambda: Invalid("422: refused by a webhook"),
}
LOST: dict[str, Callable[[], Exception]] = {"the response was lost": lambda: Unavailable("connection reset")}


@pytest.mark.parametrize(
    ("error", "applied"),
    [
        *(pytest.param(error, False, id=name) for name, error in REFUSED.items()),
        *(pytest.param(error, True, id=name) for name, error in LOST.items()),
    ],
)
def test_every_write_may_fail_once(error: Callable[[], Exception], applied: bool, tmp_path: Path) -> None:
    writes = number_of_writes(tmp_path / "undisturbed")
    for at in range(writes):
        world = new_world(tmp_path / f"{at}")

        def fail(number: int, what: str, at: int = at, world: World = world) -> None:
            if number == at and not getattr(world, "failed", False):
                world.failed = True  # type: ignore[attr-defined]
                raise error()

        if applied:
            world.api.after_write = fail
        else:
            world.api.before_write = fail
        assert asyncio.run(work_through(world)) == 1
        check(world)
        assert len(world.api.writes) <= 1.5 * writes
