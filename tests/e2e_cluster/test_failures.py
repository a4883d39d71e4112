"""Faults while two pods train: a worker, a pod, the operator and the S3 server are killed. Nothing runs twice, the
stage resumes from its last checkpoint, and the bytes equal those of an undisturbed run."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from tests.e2e_cluster.faults import kill_operator, kill_pod, kill_worker, rank0s_watched, works
from tests.e2e_cluster.world import Run, World, corpus, training, training_run, vocabulary

pytestmark = pytest.mark.cluster

STAGE = "train"
STEPS, EVERY = 600, 20
S3_OUTAGE_SECONDS = 60.0


def stages() -> list[dict[str, Any]]:
    return [corpus(), vocabulary(), training(STAGE, STEPS, every=EVERY)]


@pytest.fixture(scope="module")
def calm(world: World, namespace: str) -> Run:
    """The same stages, undisturbed, with a separate storage."""
    run = world.submit(training_run(world, namespace, "calm", stages()))
    run.complete(420)
    return run


def resumed_after(run: Run, attempt: int) -> int:
    """Return the step from which an attempt resumed, according to the log of rank 0; 0 if it started from scratch."""
    which = ("--namespace", run.namespace, run.name, STAGE, "--attempt", str(attempt), "--rank", "0")
    found = re.search(rf"resuming after step (\d+) of {STEPS}", run.world.stagecoach("logs", *which))
    return int(found[1]) if found else 0


def test_a_worker_a_pod_and_the_operator_are_killed_in_turn(world: World, namespace: str, calm: Run) -> None:
    with rank0s_watched(world, namespace, STAGE) as rank0s:
        run = world.submit(training_run(world, namespace, "stormy", stages()))
        run.wait("the first stage has ended", lambda: run.stage("corpus").get("state") == "Succeeded", 120)
        kill_operator(world)  # between two stages

        saved = []
        run.reaches(STAGE, EVERY)
        saved.append(run.saved_step(STAGE))
        kill_worker(run, STAGE, 1)
        run.wait("a second attempt is running", lambda: works(run, STAGE, 2), 180)

        # Not by saved checkpoints: the first attempt continued to save until it was killed.
        run.wait("it resumes from a checkpoint", lambda: resumed_after(run, 2) >= saved[-1] >= EVERY, 180)
        run.reaches(STAGE, resumed_after(run, 2) + EVERY)
        saved.append(run.saved_step(STAGE))
        kill_pod(run, STAGE, 0)
        run.wait("a third attempt is running", lambda: works(run, STAGE, 3), 180)

        run.wait("it resumes from a checkpoint", lambda: resumed_after(run, 3) >= saved[-1] > saved[0], 180)
        run.reaches(STAGE, resumed_after(run, 3) + EVERY)
        before = run.stage(STAGE)["attempts"][-1]
        kill_operator(world)  # while a stage trains: its attempt continues
        run.complete(300)

    after = run.stage(STAGE)["attempts"]
    assert [attempt["number"] for attempt in after] == [1, 2, 3]
    assert after[-1]["incarnations"] == before["incarnations"]
    assert resumed_after(run, 3) >= saved[1] > saved[0]
    assert run.contents() == calm.contents()
    assert (rank0s.together, rank0s.overlaps()) == ([], [])
    assert len(rank0s.seen) >= 3
    assert all(stage["attempt"] == 1 for stage in run.status()["stages"] if stage["name"] != STAGE)
    killed = run.stage(STAGE)["attempts"][0]
    assert (killed["cause"], "SIGKILL" in killed["message"]) == ("infrastructure", True)
    assert "-w-0-1-" in killed["pod"]


def test_an_outage_of_the_s3_server_for_a_minute_is_tolerated(world: World, namespace: str, calm: Run) -> None:
    if world.own is None:
        pytest.skip("only the test cluster's own S3 server can be stopped")
    run = world.submit(training_run(world, namespace, "severed", stages()))
    with rank0s_watched(world, namespace, STAGE) as rank0s:
        run.reaches(STAGE, EVERY)
        with world.without_s3():
            time.sleep(S3_OUTAGE_SECONDS)
        run.complete(420)
    assert run.contents() == calm.contents()
    assert (rank0s.together, rank0s.overlaps()) == ([], [])
    attempts = run.stage(STAGE)["attempts"]
    assert all(attempt.get("cause") in (None, "infrastructure") for attempt in attempts)
    if len(attempts) > 1:
        assert resumed_after(run, len(attempts)) >= EVERY
