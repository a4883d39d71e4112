"""Nodes that failed attempts are avoided, and attempts that find no room give back what they hold."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api import names
from stagecoach_api.outcomes import Cause
from stagecoach_api.status import StageState
from stagecoach_operator.attempt_times import moment
from stagecoach_operator.kube import JOBSETS, PODS, Body
from stagecoach_operator.node_failures import NodeFailures
from stagecoach_operator.releases import EXCLUSION_SECONDS, NO_OTHER_NODE, PARTIAL_SECONDS, release_of
from tests.operator.makers import START, Ends, Operator, World, data_stage, drive
from tests.operator.test_observe import record
from tests.operator.view_makers import NOW, jobset, meta, pending, pod

KILLED = Ends(-9, "infrastructure", "killed by signal 9", publishes=False)
DAY = 24 * 3600.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    return made


class Scheduler:
    """Leaves pods without a node: those with the given indices, or those that exclude all nodes there are."""

    def __init__(self, world: World, nodes: tuple[str, ...] = (), full_for: tuple[int, ...] = ()) -> None:
        self.affinities: list[Body] = []
        self._nodes, self._full_for = nodes, full_for
        self._make, self._work_on = world._make_pods, world._work_on
        self._world = world
        world._make_pods = self.make_pods  # type: ignore[method-assign]
        world._work_on = self.work_on  # type: ignore[method-assign]

    def make_pods(self, jobset: Body) -> bool:
        made = self._make(jobset)
        template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        if made:
            self.affinities.append(template.get("affinity", {}).get("nodeAffinity", {}))
        for body in self._world.api.all_of(PODS) if made else ():
            homeless = self._excluded(self.affinities[-1]) >= set(self._nodes) if self._nodes else False
            if homeless or int(body["metadata"]["labels"][names.COMPLETION_INDEX]) in self._full_for:
                body["spec"] = {}
        return made

    @staticmethod
    def _excluded(affinity: Body) -> set[str]:
        terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
        return {name for term in terms for field in term["matchFields"] for name in field["values"]}

    def work_on(self, pod: Body) -> bool:
        if pod["spec"] or "deletionTimestamp" in pod["metadata"] or pod["status"]["phase"] != "Pending":
            return self._work_on(pod)
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes fit"}
        return self._world._set_status(pod, {"phase": "Pending", "conditions": [condition]})


def play(world: World, seconds: float = 3600.0) -> Operator:
    async def scenario() -> Operator:
        operator = Operator(world)
        await drive(world, operator, seconds)
        operator.die()
        return operator

    return asyncio.run(scenario())


def use_two_nodes(world: World) -> None:
    """Let a run use another node, too."""
    world.input("c.txt", "third\n")
    world.holds.add("c")
    world.submit(data_stage("c", uri="c.txt", resources={"nodes": 2}), name="wide")


def test_a_node_is_avoided_after_one_failure_and_excluded_after_two(world: World) -> None:
    use_two_nodes(world)
    world.ends["a"] = [KILLED, KILLED]
    world.submit(data_stage("a"))
    scheduler = Scheduler(world)
    operator = play(world)
    field = {"key": "metadata.name", "operator": "NotIn", "values": ["node-0"]}
    preferred = [{"weight": 100, "preference": {"matchFields": [field]}}]
    required = {"nodeSelectorTerms": [{"matchFields": [field]}]}
    assert scheduler.affinities == [
        {},
        {},
        {"preferredDuringSchedulingIgnoredDuringExecution": preferred},
        {"requiredDuringSchedulingIgnoredDuringExecution": required},
    ]
    assert world.stage("a").avoided_nodes == ("node-0 (2 failures, excluded)",)
    avoided = [event.message for event in operator.events if event.reason == "NodesAvoided"]
    assert avoided == [
        "stage `a`: attempt 2 avoids node-0 (1 failure)",
        "stage `a`: attempt 3 avoids node-0 (2 failures, excluded)",
    ]


def test_a_node_counts_across_runs_and_after_a_restart(world: World) -> None:
    world.ends["a"] = [KILLED]
    world.submit(data_stage("a"))
    play(world, 2.5)
    scheduler = Scheduler(world)
    world.input("b.txt", "other\n")
    world.submit(data_stage("b", uri="b.txt"), name="other")
    play(world)
    assert all("preferredDuringSchedulingIgnoredDuringExecution" in item for item in scheduler.affinities)
    assert world.stage("b", "other").avoided_nodes == ("node-0 (1 failure)",)


@pytest.mark.parametrize("failures", [2, 5])
def test_the_only_node_of_a_cluster_is_never_excluded(world: World, failures: int) -> None:
    world.ends["a"] = [KILLED] * failures
    world.submit(data_stage("a"))
    Scheduler(world, nodes=("node-0",))
    play(world)
    stage = world.stage("a")
    assert (stage.state, stage.attempt) == (StageState.SUCCEEDED, failures + 1)
    assert stage.avoided_nodes == (f"node-0 ({failures} failures)",)


def test_an_excluded_node_is_used_if_no_other_fits(world: World) -> None:
    use_two_nodes(world)
    world.ends["a"] = [KILLED, KILLED]
    world.submit(data_stage("a"))
    Scheduler(world, nodes=("node-0",))
    play(world)
    stage = world.stage("a")
    assert (stage.state, stage.attempt) == (StageState.SUCCEEDED, 4)
    assert NO_OTHER_NODE in stage.attempts[2].message
    assert (stage.restarts.infrastructure, stage.restarts.preemption) == (2, 1), "the wait is not charged"


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"cause": Cause.INFRASTRUCTURE}, True),
        ({"cause": Cause.INFRASTRUCTURE, "exit_code": 74}, False),
        ({"cause": Cause.INFRASTRUCTURE, "message": "OOMKilled: the container ran out of memory"}, False),
        ({"cause": Cause.USER}, False),
        ({"cause": Cause.PREEMPTION}, False),
        ({"cause": Cause.INFRASTRUCTURE, "node": ""}, False),
    ],
)
def test_only_what_may_be_the_nodes_fault_counts(fields: dict[str, Any], counts: bool) -> None:
    failures = NodeFailures()
    ended = record(**{"ended": moment(START), "node": "n", **fields})
    for _ in range(3):
        failures.note("run", {("a", 1): ended}, START)
    assert [node.failures for node in failures.avoided(START, exclude=True)] == [1] * counts
    assert failures.avoided(START + DAY, exclude=True) == ()


def test_half_a_gang_gives_back_what_it_holds_uncharged(world: World) -> None:
    """Kubeflow training-operator#1749: two gangs hold half of the GPUs each, and both wait for the other half."""
    world.holds.add("a")
    world.submit(data_stage("a", resources={"nodes": 2, "gpusPerNode": 8}))
    Scheduler(world, full_for=(1,))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, PARTIAL_SECONDS - 10)
        assert world.stage("a").attempt == 1
        assert "0/3 nodes fit" in world.stage("a").waiting_for
        await drive(world, operator, 60)
        stage = world.stage("a")
        assert (stage.attempt, stage.attempts[0].cause) == (2, Cause.PREEMPTION)
        assert "1 of 2 pods have a node" in stage.attempts[0].message
        operator.die()

    asyncio.run(scenario())
    assert len(world.api.all_of(JOBSETS)) == 1


@pytest.mark.parametrize(
    ("pods", "has_run", "excludes", "seconds"),
    [
        ((pod(0), pending(1, node="", unschedulable="0/3")), False, False, PARTIAL_SECONDS),
        ((pod(0),), False, False, PARTIAL_SECONDS),
        ((pod(0),), True, False, None),
        ((pod(0), pod(1)), False, False, None),
        ((pod(0), pending(1)), False, False, None),
        ((pending(0, node="", unschedulable="0/3"), pending(1, node="", unschedulable="0/3")), False, False, None),
        ((pending(0, node="", unschedulable="0/3"), pending(1, node="", unschedulable="0/3")), False, True, 60.0),
        ((pod(0), pending(1, node="", unschedulable="0/3", meta=meta("a-1", deleting=True))), False, False, None),
        ((), False, True, None),
    ],
)
def test_what_is_released_and_when(pods: Any, has_run: bool, excludes: bool, seconds: float | None) -> None:
    found = release_of(jobset(2, excludes_nodes=excludes), pods, has_run, NOW - 100)
    assert (None if found is None else found.at) == (None if seconds is None else NOW - 100 + seconds)
    assert EXCLUSION_SECONDS == 60.0
