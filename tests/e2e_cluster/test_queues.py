"""Two runs with quota for one stage: which one runs, which one waits, which one is preempted, and at what cost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e_cluster.queues import priority_class, queue_with_quota
from tests.e2e_cluster.world import Run, World, corpus, training, training_run, vocabulary

pytestmark = pytest.mark.cluster

QUEUE = "narrow"
STEPS = 400
"""Enough steps that the stage is still training when it is stopped, even on a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def queue(world: World, namespace: str) -> Iterator[None]:
    """Quota for one stage at a time: one CPU, which every stage requests. A higher priority preempts."""
    world.apply(*(priority_class(name, value) for name, value in {"low": 1, "high": 1000}.items()))
    with queue_with_quota(world, namespace, QUEUE, {"cpu": "1"}, preempts=True):
        yield


def queued(world: World, namespace: str, name: str, priority: str, steps: int = STEPS) -> dict[str, Any]:
    """Return a run in which every stage requests the whole quota."""
    stages = [
        {**corpus(), "resources": {"cpu": "1"}},
        {**vocabulary(), "resources": {"cpu": "1"}},
        training("train", steps),
    ]
    defaults = {"resources": {"cpu": "500m"}, "queue": {"name": QUEUE, "priorityClass": priority}}
    return training_run(world, namespace, name, stages, defaults=defaults)


def reservations(world: World, namespace: str) -> list[str]:
    """Return the names of the JobSets that hold quota now."""
    holders = []
    for workload in world.list("workloads.kueue.x-k8s.io", namespace):
        conditions = {item["type"]: item["status"] for item in workload.get("status", {}).get("conditions", ())}
        if conditions.get("QuotaReserved") == "True" and conditions.get("Finished") != "True":
            holders.append(workload["metadata"]["ownerReferences"][0]["name"])
    return holders


def test_two_runs_take_turns_and_neither_holds_quota_it_does_not_use(world: World, namespace: str) -> None:
    runs = [world.submit(queued(world, namespace, f"turn-{name}", "low", steps=10)) for name in ("a", "b")]
    seen: set[str] = set()
    deadline = time.monotonic() + 420
    while not all(run.has("Complete") for run in runs):
        assert time.monotonic() < deadline, "\n".join(run.described() for run in runs)
        holders = reservations(world, namespace)
        assert len(holders) <= 1
        seen.update(holders)
    assert len(seen) == 6  # each of the six stages had quota once
    finished = [[stage["finished"] for stage in run.status()["stages"]] for run in runs]
    assert min(map(max, finished)) > max(map(min, finished))  # stage by stage, not run after run


def test_a_suspended_stage_releases_its_quota_and_resumes_from_its_last_step(
    world: World, namespace: str, tmp_path: Path
) -> None:
    file = tmp_path / "pause.json"
    file.write_text(json.dumps(queued(world, namespace, "pause", "low")))
    assert "created" in world.stagecoach("submit", str(file), "--set", "seed=2")
    run = Run(world, namespace, "pause")
    run.reaches("train", 20, 240)
    world.stagecoach("suspend", "--namespace", namespace, "pause", "--wait")
    assert run.stage("train")["state"] == "Suspended"
    assert run.pods("train") == []
    assert reservations(world, namespace) == []
    saved = run.saved_step("train")
    assert saved >= 20

    world.stagecoach("resume", "--namespace", namespace, "pause")
    run.runs_stage("train")
    followed = world.stagecoach("logs", "--namespace", namespace, "pause", "train", "--follow")
    assert re.search(rf"rank 0.*resuming after step {saved} of {STEPS}", followed), followed
    run.complete(300)
    assert run.stage("train")["restarts"].get("infrastructure", 0) == 0
    kept = world.stagecoach("logs", "--namespace", namespace, "pause", "train", "--attempt", "1")
    assert "resuming after" not in kept
    assert "[rank 1]" in kept  # the pods are deleted, but their logs are kept


def test_a_run_of_higher_priority_preempts_and_both_complete(world: World, namespace: str) -> None:
    low = world.submit(queued(world, namespace, "modest", "low"))
    low.reaches("train", 20, 240)
    high = world.submit(queued(world, namespace, "urgent", "high", steps=10))
    low.wait("it is preempted", lambda: low.has("QuotaReserved", "Preempted"), 60)
    high.complete(240)
    low.complete(300)
    assert finished(high, "corpus") < finished(low, "train")
    restarts = low.stage("train").get("restarts", {})
    assert restarts.get("infrastructure", 0) == restarts.get("user", 0) == 0  # preemptions do not count as failures


def finished(run: Run, stage: str) -> str:
    return str(run.stage(stage)["finished"])
