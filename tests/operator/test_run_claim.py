"""Two installations of the operator that see the same runs: one works on a run, the other leaves it alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stagecoach_api import names
from stagecoach_api.status import StageState
from stagecoach_operator.kube import TRAINING_RUNS
from tests.operator.makers import NAMESPACE, Operator, World, data_stage


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    return made


def operator_of(world: World, lease: str, code: str) -> Operator:
    """Return an operator of an installation of its own, with its own release of the trainer."""
    own = world.settings
    world.settings = own.model_copy(
        update={"lease_name": lease, "trainer_code": code, "trainer_image": f"trainer:{code}"}
    )
    made = Operator(world)
    world.settings = own
    return made


async def turns(world: World, *operators: Operator, count: int = 40) -> None:
    """Let operators and cluster work in turn, a second each."""
    for _ in range(count):
        await asyncio.gather(*(operator.settle() for operator in operators))
        world.tick()
        world.now += 1.0


def test_of_two_operators_that_see_a_run_one_works_on_it(world: World) -> None:
    """270 attempts were made in 10 minutes, each of which stopped one of the other operator."""
    world.submit(data_stage("a"), data_stage("b", "a"))

    async def scenario() -> None:
        operators = operator_of(world, "one", "code-1"), operator_of(world, "two", "code-2")
        await turns(world, *operators)
        assert world.status().installation in ("stagecoach-system/one", "stagecoach-system/two")
        assert [stage.state for stage in world.status().stages] == [StageState.SUCCEEDED] * 2
        assert len(world.pods_made) == 2
        assert world.two_at_once == []
        other = operators[world.status().installation.endswith("one")]
        blocked = [event.message for event in other.events if event.reason == "Blocked"]
        assert len(blocked) == 1, "it is reported once"
        assert world.status().installation in blocked[0]
        for operator in operators:
            operator.die()

    asyncio.run(scenario())


def test_an_annotation_hands_a_run_over(world: World) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        first = operator_of(world, "one", "code-1")
        await turns(world, first, count=10)
        second = operator_of(world, "two", "code-1")
        await turns(world, first, second, count=10)
        assert world.status().installation == "stagecoach-system/one"
        first.die()  # uninstalled
        await turns(world, second, count=10)
        assert world.stage("a").state is StageState.RUNNING
        given = {"annotations": {names.ANNOTATION_INSTALLATION: "stagecoach-system/two"}}
        world.api.edit(TRAINING_RUNS, NAMESPACE, "demo", metadata=given)
        world.holds.clear()
        await turns(world, second, count=20)
        second.die()

    asyncio.run(scenario())
    assert world.status().installation == "stagecoach-system/two"
    assert world.stage("a").state is StageState.SUCCEEDED
    assert len(world.pods_made) == 1, "the attempt of the first installation is taken over"


def test_a_run_of_another_controller_is_left_alone(world: World) -> None:
    world.submit(data_stage("a"), managedBy="kueue.x-k8s.io/multikueue")
    world.submit(data_stage("a"), name="own", managedBy=names.MANAGER)

    async def scenario() -> None:
        operator = Operator(world)
        await turns(world, operator, count=15)
        operator.die()

    asyncio.run(scenario())
    assert world.run().status_raw == {}
    assert world.stage("a", "own").state is StageState.SUCCEEDED
