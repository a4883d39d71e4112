"""When an attempt has run and waited."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api import names
from stagecoach_api.status import AttemptStatus, Reason, StageState
from stagecoach_operator.attempt_times import moment, running_seconds, with_times, without_future
from stagecoach_operator.kube import JOBSETS, PODS, WORKLOADS, Body, Resource
from stagecoach_operator.pod_startup import KINDS, Waiting
from tests.operator.makers import Operator, World, data_stage, drive
from tests.operator.view_makers import DIGEST, NOW

HOUR = 3600.0
HELD = Waiting(Reason.PREEMPTED, "Preempted to accommodate a workload")


def record(**fields: Any) -> AttemptStatus:
    return AttemptStatus(**{"number": 1, "digest": DIGEST, "name": "a-1", "started": moment(NOW), **fields})


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10**6), st.integers(1, 4)), min_size=1, max_size=20))
def test_only_the_time_in_which_all_pods_run_counts(spans: list[tuple[bool, int, int]]) -> None:
    """Oracle: the sum of the spans in which it ran; a span is looked at several times."""
    now, ran, attempt = NOW, 0, record()
    for is_held, seconds, looks in spans:
        for _ in range(looks):
            attempt = with_times(attempt, HELD if is_held else None, now)
        now += seconds
        ran += 0 if is_held else seconds
    assert abs(running_seconds(attempt, now) - ran) < 0.01 * len(spans)
    ended = attempt.model_copy(update={"ended": moment(now)})
    assert abs(running_seconds(ended, now + 10**6) - ran) < 0.01 * len(spans)


def test_times_of_an_operator_whose_clock_was_ahead_are_brought_to_now() -> None:
    ahead = with_times(record(started=moment(NOW + HOUR)), HELD, NOW + HOUR)
    (own,) = without_future({("a", 1): ahead}, NOW).values()
    assert (own.started, own.waits[0].since) == (moment(NOW), moment(NOW))
    assert without_future({("a", 1): ahead}, NOW + HOUR) == {("a", 1): ahead}


def test_every_reason_to_wait_has_a_deadline() -> None:
    assert all(isinstance(Reason(reason), Reason) for reason in KINDS)


class Kueue:
    """Suspends every JobSet that has a queue, until it is admitted."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.api.watchers.append(self._hear)

    def _hear(self, resource: Resource, kind: str, body: Body) -> None:
        if resource == JOBSETS and kind == "ADDED" and names.LABEL_QUEUE in body["metadata"]["labels"]:
            name, uid = body["metadata"]["name"], body["metadata"]["uid"]
            owner = {"kind": "JobSet", "uid": uid, "controller": True}
            workload = {"kind": "Workload", "metadata": {"name": name, "namespace": "team", "ownerReferences": [owner]}}
            self.world.api.add(WORKLOADS, {**workload, "status": self._status("False")})
            self.world.api.edit(JOBSETS, "team", name, spec={"suspend": True})

    def _status(self, reserved: str, *more: Body) -> Body:
        return {"conditions": [{"type": "QuotaReserved", "status": reserved, "message": "wait"}, *more]}

    def admit(self, name: str) -> None:
        self.world.api.edit(WORKLOADS, "team", name, status=self._status("True"))
        self.world.api.edit(JOBSETS, "team", name, spec={"suspend": False})

    def preempt(self, name: str) -> None:
        evicted = {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "Preempted by another"}
        self.world.api.edit(WORKLOADS, "team", name, status=self._status("False", evicted))
        self.world.api.edit(JOBSETS, "team", name, spec={"suspend": True})
        for pod in self.world.api.all_of(PODS):
            pod["metadata"]["finalizers"] = ["kubelet"]
            self.world.api.remove(PODS, "team", pod["metadata"]["name"])


def test_what_kueue_held_in_suspension_is_neither_running_time_nor_gpu_time(tmp_path: Path) -> None:
    """An hour of work, thirty hours preempted, ten minutes of work: TimedOut at 24 h, and 493 GPU-hours for 19."""
    world = World(tmp_path)
    world.input("a.txt")
    kueue = Kueue(world)
    world.holds.add("a")
    resources = {"nodes": 2, "gpusPerNode": 8}
    world.submit(data_stage("a", queue={"name": "research"}, resources=resources, timeoutSeconds=24 * 3600))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 20)
        (name,) = world.jobsets()
        kueue.admit(name)
        await drive(world, operator, 10)
        world.now += HOUR
        kueue.preempt(name)
        await drive(world, operator, 10)
        world.now += 30 * HOUR
        operator.die()
        operator = Operator(world)  # which remembers nothing
        kueue.admit(name)
        await drive(world, operator, 10)
        world.now += 600
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    stage = world.stage("a")
    assert (stage.state, stage.attempt) == (StageState.SUCCEEDED, 1)
    assert abs(stage.gpu_seconds - 16 * (HOUR + 600)) < 16 * 60
