"""Pods that do not end: on lost nodes, next to a rank 0 that is done, and without their JobSet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api import names
from stagecoach_api.outcomes import Cause
from stagecoach_api.status import RunState, StageState
from stagecoach_core.values import AttemptState
from stagecoach_operator.kube import JOBSETS, PODS, TRAINING_RUNS, Body
from stagecoach_operator.lost_nodes import REMOVAL_SECONDS, Patience, is_ignored, is_lost, next_moment
from stagecoach_operator.object_cache import Children
from stagecoach_operator.observe import Signals, observe
from tests.operator.makers import START, Ends, Operator, World, data_stage, drive
from tests.operator.view_makers import NOW, RUN, jobset, meta, pod

TWO_NODES = {"nodes": 2, "gpusPerNode": 8}


class Nodes:
    """Makes pods of a world stop reacting: the node is lost, or the process hangs until it is killed."""

    def __init__(self, world: World) -> None:
        self.lost: set[str] = set()
        self.hanging: set[str] = set()
        self.failing: dict[str, Ends] = {}
        self._world = world
        self._work_on: Callable[[Body], bool] = world._work_on
        world._work_on = self.work_on  # type: ignore[method-assign]

    def work_on(self, pod: Body) -> bool:
        name = pod["metadata"]["name"]
        if name in self.lost or (name in self.hanging and "deletionTimestamp" not in pod["metadata"]):
            return False
        if name in self.failing and pod["status"]["phase"] == "Running":
            self._world._finish(pod, self.failing[name], int(pod["metadata"]["labels"][names.COMPLETION_INDEX]))
            return True
        return self._work_on(pod)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    return made


def pod_names(world: World) -> list[str]:
    return sorted(pod["metadata"]["name"] for pod in world.api.all_of(PODS))


def test_a_pod_on_a_lost_node_does_not_stop_its_run(world: World) -> None:
    """Kubernetes#72226: the pod of a node that is down stays `Terminating` until it is removed by force."""
    world.holds.add("a")
    world.submit(data_stage("a", resources=TWO_NODES))
    nodes = Nodes(world)

    async def scenario() -> Operator:
        operator = Operator(world)
        await drive(world, operator, 30)
        first, second = pod_names(world)
        nodes.lost.add(second)
        nodes.failing[first] = Ends(1, "infrastructure", "connection closed by peer", publishes=False)
        await drive(world, operator, 60)
        assert world.stage("a").state is StageState.STOPPING, "the next attempt waits for the pod"
        await drive(world, operator, world.settings.lost_node_seconds + 60)
        stage = world.stage("a")
        assert (stage.attempt, stage.attempts[0].cause) == (2, Cause.INFRASTRUCTURE)
        assert stage.attempts[0].node == "node-1"
        assert "node node-1 is lost" in stage.attempts[0].message
        assert "connection closed by peer" in stage.attempts[0].message
        assert "Z" in stage.attempts[0].message, "the time is named"
        nodes.failing.clear()
        world.holds.clear()
        await drive(world, operator)
        operator.die()
        return operator

    operator = asyncio.run(scenario())
    assert world.stage("a").state is StageState.SUCCEEDED
    assert [event.message.count("node-1") for event in operator.events if event.reason == "NodeLost"] == [1]
    assert world.stage("a").restarts.infrastructure == 1


def test_a_node_that_is_lost_under_a_silent_gang_ends_the_attempt(world: World) -> None:
    """The other ranks wait for the lost one in a collective, and nothing of theirs fails."""
    world.holds.add("a")
    world.submit(data_stage("a", resources=TWO_NODES))
    nodes = Nodes(world)

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        lost = pod_names(world)[1]
        nodes.lost.add(lost)
        # As the node lifecycle controller does for a node with the `unreachable` taint.
        await world.api.delete(PODS, "team", lost, foreground=False)
        await drive(world, operator, world.settings.lost_node_seconds + 60)
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    stage = world.stage("a")
    assert (stage.state, stage.attempt) == (StageState.SUCCEEDED, 2)
    assert (stage.attempts[0].cause, stage.attempts[0].node) == (Cause.INFRASTRUCTURE, "node-1")


def test_a_removal_that_is_not_allowed_does_not_stop_the_run(world: World) -> None:
    """A finalizer of another controller holds the pod, or the Role of an earlier release does not allow its removal."""
    world.holds.add("a")
    world.submit(data_stage("a", resources=TWO_NODES))
    nodes = Nodes(world)

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        lost = pod_names(world)[1]
        nodes.lost.add(lost)
        world.api.objects[PODS.plural, "team", lost]["metadata"]["finalizers"] = ["example.com/holds"]
        world.api.edit_spec("demo", suspend=True)
        await drive(world, operator, 2 * world.settings.lost_node_seconds + 2 * REMOVAL_SECONDS)
        assert world.stage("a").attempts[0].cause is Cause.PREEMPTION, "the user asked for the end"
        world.holds.clear()
        world.api.edit_spec("demo", suspend=False)
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert world.stage("a").state is StageState.SUCCEEDED


def test_what_hangs_beside_a_finished_rank_0_is_released(world: World) -> None:
    """NVIDIA/nccl#1013: a rank may hang while its communicators are torn down, after the work is done."""
    world.submit(data_stage("a", resources=TWO_NODES))
    nodes = Nodes(world)

    async def scenario() -> None:
        operator = Operator(world)
        await operator.settle()
        world.tick()
        nodes.hanging.add(pod_names(world)[1])
        await drive(world, operator, 60)
        assert len(pod_names(world)) == 2, "the pods have time to end by themselves"
        await drive(world, operator, world.settings.leftover_seconds + 60)
        operator.die()

    asyncio.run(scenario())
    summary = world.status().summary
    assert summary is not None
    assert (summary.state, world.stage("a").attempt) == (RunState.COMPLETE, 1)
    assert (pod_names(world), world.jobsets()) == ([], [])


def test_what_hangs_is_released_by_the_next_leader(world: World) -> None:
    world.submit(data_stage("a", resources=TWO_NODES))
    nodes = Nodes(world)

    async def scenario() -> None:
        operator = Operator(world)
        await operator.settle()
        world.tick()
        nodes.hanging.add(pod_names(world)[1])
        await drive(world, operator, 60)
        operator.die()
        operator = Operator(world)
        operator.enqueue(world.run().meta.uid)
        await drive(world, operator, world.settings.leftover_seconds + 60)
        operator.die()

    asyncio.run(scenario())
    assert (pod_names(world), world.jobsets()) == ([], [])


def test_the_jobset_of_a_finished_gang_is_kept_for_its_logs(world: World) -> None:
    world.submit(data_stage("a", resources=TWO_NODES))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 24 * 3600.0)
        operator.die()

    asyncio.run(scenario())
    assert (len(pod_names(world)), len(world.jobsets())) == (2, 1)


@pytest.mark.parametrize("orphan", [False, True], ids=["in the background", "with its pods orphaned"])
def test_pods_outlive_a_jobset_that_was_deleted(world: World, orphan: bool) -> None:
    """`kubectl delete jobset` deletes in the background: the JobSet is gone while its pods still save a checkpoint."""
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        (pod,) = world.api.all_of(PODS)
        pod["metadata"]["ownerReferences"] = []
        if not orphan:
            await world.api.delete(PODS, "team", pod["metadata"]["name"], foreground=False)
        world.api.remove(JOBSETS, "team", world.jobsets()[0])
        await operator.settle()
        assert world.stage("a").state is StageState.STOPPING
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    stage = world.stage("a")
    assert (stage.state, stage.attempt, world.two_at_once) == (StageState.SUCCEEDED, 2, [])
    assert "deleted by another client" in stage.attempts[0].message


def test_a_run_does_not_hold_its_namespace(world: World) -> None:
    """Kubernetes#60807: a namespace whose operator is deleted before its objects stays `Terminating` for ever."""
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        operator.die()
        world.holds.clear()
        world.api.remove(TRAINING_RUNS, "team", "demo")
        while world.tick():
            pass

    asyncio.run(scenario())
    assert not [key for key in world.api.objects if key[0] != "events"]


def test_the_finalizer_of_earlier_versions_is_removed(world: World) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))
    world.api.edit(TRAINING_RUNS, "team", "demo", metadata={"finalizers": [names.FINALIZER, "example.com/other"]})

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        operator.die()

    asyncio.run(scenario())
    assert world.run().finalizers == ("example.com/other",)
    assert world.stage("a").state is StageState.RUNNING


@given(
    st.lists(st.tuples(st.booleans(), st.one_of(st.just(0.0), st.floats(NOW - 1000, NOW + 1000))), max_size=4),
    st.floats(10, 1000),
)
def test_no_stopping_attempt_waits_for_ever(given_pods: list[tuple[bool, float]], limit: float) -> None:
    """Whatever pods are left: at the moments that are returned, the attempt comes closer to its end, and reaches it."""
    patience = Patience(lost_node_seconds=limit)
    pods = tuple(
        pod(index, phase="Failed" if done else "Running", meta=meta(f"a-{index}", deleting=True, delete_by=by or NOW))
        for index, (done, by) in enumerate(given_pods)
    )
    deleting = jobset(meta=meta("a-1", deleting=True, delete_by=NOW), num_pods=max(1, len(pods)))
    now, seen = NOW, []
    for _ in range(2 * len(pods) + 3):
        (attempt,) = observe(RUN, {}, Children((deleting,), pods), Signals(patience=patience), now).values()
        seen.append(attempt.state)
        if attempt.state is AttemptState.ENDED:
            break
        later = next_moment(pods, now, patience)
        now = max(now + 0.001, later if later is not None else deleting.meta.delete_by + limit)
    assert seen[-1] is AttemptState.ENDED
    assert now <= NOW + 1000 + limit + REMOVAL_SECONDS + 1
    assert all(is_ignored(item, now, patience) for item in pods)


def test_a_pod_is_not_lost_within_its_grace_period() -> None:
    patience = Patience(lost_node_seconds=300)
    terminating = pod(meta=meta("a-0", deleting=True, delete_by=START))
    assert not is_lost(terminating, START + 299, patience)
    assert is_lost(terminating, START + 300, patience)
    assert not is_lost(replace(terminating, phase="Failed"), START + 300, patience)
    assert not is_lost(pod(), START + 10**6, patience), "it was not asked to end"
