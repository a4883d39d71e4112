"""JobSets and pods that seem to be gone, and are not: no second rank 0 is created while one still trains."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api import names
from stagecoach_api.outcomes import Cause
from stagecoach_api.status import StageState
from stagecoach_operator.kube import JOBSETS, PODS, NotServed, RequestForbidden, Resource
from tests.operator.makers import NAMESPACE, Operator, World, data_stage, drive


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    made.holds.add("a")
    made.submit(data_stage("a"))
    return made


def take_off(world: World, operator: Operator, what: str) -> None:
    """Take labels or the owner off the JobSet. A watch with a selector then reports it as deleted."""
    (body,) = world.api.all_of(JOBSETS)
    before = copy.deepcopy(body)
    changes: dict[str, dict[str, Any]] = {
        "the label it is selected by": {"labels": {names.LABEL_MANAGED_BY: None}},
        "all labels": {"labels": dict.fromkeys(before["metadata"]["labels"])},
        "its owner": {"ownerReferences": None},
        "labels and owner": {"labels": dict.fromkeys(before["metadata"]["labels"]), "ownerReferences": None},
        "the number of its attempt": {"labels": {names.LABEL_ATTEMPT: "7"}},
        "nothing": {},
    }
    world.api.edit(JOBSETS, NAMESPACE, body["metadata"]["name"], metadata=changes[what])
    if "label" in what or what == "nothing":
        operator.receive(JOBSETS, "DELETED", before)


@pytest.mark.parametrize(
    "what",
    [
        "the label it is selected by",
        "all labels",
        "its owner",
        "labels and owner",
        "the number of its attempt",
        "nothing",
    ],
)
def test_a_jobset_without_what_makes_it_ours_is_adopted_again(world: World, what: str) -> None:
    """argo-cd#2301, JobSet#467: tools prune labels and owner references that they do not know."""

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        before = copy.deepcopy(world.api.all_of(JOBSETS)[0])
        take_off(world, operator, what)
        await drive(world, operator, 60)
        assert (world.stage("a").state, world.stage("a").attempt) == (StageState.RUNNING, 1)
        if what != "the number of its attempt":  # the identity is read from the pod template, so nothing is missing
            after = world.api.all_of(JOBSETS)[0]["metadata"]
            assert after["labels"] == before["metadata"]["labels"]
            assert after["ownerReferences"] == before["metadata"]["ownerReferences"]
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    stage = world.stage("a")
    assert (stage.state, stage.attempt, world.two_at_once) == (StageState.SUCCEEDED, 1, [])


def test_the_run_waits_while_it_is_unclear_whose_a_jobset_is(world: World) -> None:
    """Another controller has taken it over: it is neither ours to change, nor gone."""

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        (name,) = world.jobsets()
        other = {"kind": "JobSet", "metadata": {"name": "other", "namespace": NAMESPACE}, "spec": {"suspend": True}}
        owner = [{"kind": "JobSet", "uid": world.api.add(JOBSETS, other)["metadata"]["uid"], "controller": True}]
        world.api.edit(JOBSETS, NAMESPACE, name, metadata={"ownerReferences": owner})
        await drive(world, operator, 600)
        assert world.stage("a").attempt == 1
        assert f"JobSet {name} exists" in world.stage("a").waiting_for
        world.api.remove(JOBSETS, NAMESPACE, name)
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert (world.stage("a").state, world.stage("a").attempt) == (StageState.SUCCEEDED, 2)
    assert world.two_at_once == []


@pytest.mark.parametrize("error", [NotServed("404 page not found"), RequestForbidden("no get")])
def test_a_jobset_that_cannot_be_read_is_not_gone(
    world: World, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API server that starts answers 404 for kinds that it does not serve yet."""

    async def refuse(resource: Resource, namespace: str, name: str) -> Any:
        raise error

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        with monkeypatch.context() as patch:
            patch.setattr(world.api, "get", refuse)
            take_off(world, operator, "the label it is selected by")
            await drive(world, operator, 60)
        assert "cannot be read" in world.stage("a").waiting_for
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert (world.stage("a").state, world.stage("a").attempt) == (StageState.SUCCEEDED, 1)


def test_a_jobset_that_is_gone_is_read_once(world: World) -> None:
    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        world.api.remove(JOBSETS, NAMESPACE, world.jobsets()[0])
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert [what for what in world.api.reads if what.startswith("get jobsets")] == ["get jobsets r-demo-a-fae6c0-1"]
    assert world.stage("a").attempts[0].cause is Cause.INFRASTRUCTURE


def test_a_copy_under_another_name_is_not_an_attempt(world: World) -> None:
    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        copied = copy.deepcopy(world.api.all_of(JOBSETS)[0])
        copied["metadata"] = {key: copied["metadata"][key] for key in ("namespace", "labels", "ownerReferences")}
        copied["metadata"] |= {"name": "copy", "annotations": {names.ANNOTATION_STAGE_DIGEST: "0" * 64}}
        copied["spec"]["suspend"] = True
        world.api.add(JOBSETS, copied)
        await drive(world, operator, 60)
        assert world.stage("a").state is StageState.RUNNING
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert (world.stage("a").state, world.stage("a").attempt) == (StageState.SUCCEEDED, 1)


@pytest.mark.parametrize("labels", ["one", "all"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_pod_without_labels_is_still_the_attempts(world: World, labels: str, restarted: bool) -> None:
    """A watch with a selector reports it as deleted, while it trains on."""

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        (pod,) = world.api.all_of(PODS)
        before = copy.deepcopy(pod)
        taken = before["metadata"]["labels"] if labels == "all" else {names.LABEL_MANAGED_BY: ""}
        world.api.edit(PODS, NAMESPACE, pod["metadata"]["name"], metadata={"labels": dict.fromkeys(taken)})
        # The kubelet of the world finds a pod's stage by its labels; this one runs on its own.
        work_on, world._work_on = world._work_on, lambda pod: False  # type: ignore[method-assign]
        if restarted:
            operator.die()
            operator = Operator(world)
            operator.enqueue(world.run().meta.uid)
        operator.receive(PODS, "DELETED", before)
        for _ in range(20):
            await drive(world, operator, 60)
            operator.cache.remove(before["metadata"]["uid"])  # as the audit does
            operator.enqueue(world.run().meta.uid)
        assert (world.stage("a").state, world.stage("a").attempt) == (StageState.RUNNING, 1)
        world.api.edit(PODS, NAMESPACE, pod["metadata"]["name"], metadata={"labels": before["metadata"]["labels"]})
        world._work_on = work_on  # type: ignore[method-assign]
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert (world.stage("a").state, world.stage("a").attempt, world.two_at_once) == (StageState.SUCCEEDED, 1, [])


def test_the_end_of_a_pod_without_labels_is_seen(world: World) -> None:
    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        (pod,) = world.api.all_of(PODS)
        before = copy.deepcopy(pod)
        world.api.edit(PODS, NAMESPACE, pod["metadata"]["name"], metadata={"labels": {names.LABEL_MANAGED_BY: None}})
        operator.receive(PODS, "DELETED", before)
        unheard = world.api.watchers.pop()
        world.holds.clear()
        while world.tick():
            pass
        world.api.watchers.append(unheard)
        await drive(world, operator, 120)
        operator.die()

    asyncio.run(scenario())
    assert (world.stage("a").state, world.stage("a").attempt) == (StageState.SUCCEEDED, 1)
