"""What is killed while two pods train: a worker, a pod, the operator, the S3 server. Nothing runs twice, the stage goes
on from its last checkpoint, and the bytes are those of a run that nobody disturbed."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest
from cluster_world import RELEASE, SYSTEM, Run, World, corpus, training, training_run, vocabulary

from stagecoach_api import names

pytestmark = pytest.mark.cluster

STAGE = "train"
STEPS, EVERY = 600, 20
S3_AWAY_SECONDS = 60.0


def stages() -> list[dict[str, Any]]:
    return [corpus(), vocabulary(), training(STAGE, STEPS, every=EVERY)]


@pytest.fixture(scope="module")
def calm(world: World, namespace: str) -> Run:
    """The same work, undisturbed, with a storage of its own."""
    run = world.submit(training_run(world, namespace, "calm", stages()))
    run.complete(420)
    return run


# -- two rank 0s -------------------------------------------------------------------------------------------------------


@dataclass
class Rank0s:
    """When the containers of a stage's pods 0 ran, read off the API server again and again."""

    world: World
    namespace: str
    stop: threading.Event = field(default_factory=threading.Event)
    seen: dict[str, tuple[datetime, datetime | None]] = field(default_factory=dict)
    """Start and end by pod's UID; no end: it ran when it was last seen."""
    together: list[set[str]] = field(default_factory=list)
    """Pods whose containers were seen running at one and the same moment."""

    def look(self) -> None:
        running = set()
        for pod in self.world.list("pods", self.namespace, {names.LABEL_STAGE: STAGE, names.COMPLETION_INDEX: "0"}):
            for container in pod["status"].get("containerStatuses", ()):
                state = container["state"].get("running") or container["state"].get("terminated")
                if state is None:
                    continue
                if "running" in container["state"]:
                    running.add(pod["metadata"]["uid"])
                ended = state.get("finishedAt")
                self.seen[pod["metadata"]["uid"]] = (_time(state["startedAt"]), _time(ended) if ended else None)
        if len(running) > 1:
            self.together.append(running)

    def watch(self) -> None:
        while not self.stop.is_set():
            self.look()
            self.stop.wait(0.3)

    def overlaps(self) -> list[tuple[str, str]]:
        """Return the pods of which one began before another was known to have ended."""
        ordered = sorted(self.seen.items(), key=lambda item: item[1][0])
        return [
            (one, other)
            for (one, (_, ended)), (other, (began, _)) in pairwise(ordered)
            if ended is not None and began < ended
        ]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


@contextmanager
def rank0s_watched(world: World, namespace: str) -> Iterator[Rank0s]:
    watched = Rank0s(world, namespace)
    thread = threading.Thread(target=watched.watch, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        watched.stop.set()
        thread.join()


# -- killing -----------------------------------------------------------------------------------------------------------


def pod_of(run: Run, index: int) -> str:
    """Return the living pod of an index of the stage."""
    (found,) = [
        pod["metadata"]["name"]
        for pod in run.pods(STAGE)
        if pod["metadata"]["labels"][names.COMPLETION_INDEX] == str(index) and pod["status"]["phase"] == "Running"
    ]
    return str(found)


def kill_worker(run: Run, rank: int) -> None:
    """Kill a rank's process, not its launcher."""
    code = (
        "import os, pathlib, signal; "
        f"path = pathlib.Path('{names.WORK_FOLDER}/outcomes/rank-{rank:05d}.pid'); "
        "os.kill(int(path.read_text()), signal.SIGKILL)"
    )
    run.world.kubectl("exec", pod_of(run, rank), f"-n{run.namespace}", "--", "python", "-c", code)


def kill_pod(run: Run, index: int) -> None:
    """Delete a pod with one second to end in."""
    run.world.kubectl("delete", "pod", pod_of(run, index), f"-n{run.namespace}", "--grace-period=1", "--wait=false")


def kill_operator(world: World) -> None:
    """Remove every replica of the operator at once, and wait until one works again."""
    selector = f"--selector=app.kubernetes.io/instance={RELEASE}"
    world.kubectl("delete", "pods", f"-n{SYSTEM}", selector, "--grace-period=0", "--force")
    world.kubectl("rollout", "status", f"deployment/{RELEASE}", f"-n{SYSTEM}", "--timeout=120s")


def resumed_after(run: Run, attempt: int) -> int:
    """Return the step after which an attempt's rank 0 says that it went on. 0: it began anew."""
    which = ("--namespace", run.namespace, run.name, STAGE, "--attempt", str(attempt), "--rank", "0")
    found = re.search(rf"going on after step (\d+) of {STEPS}", run.world.stagecoach("logs", *which))
    return int(found[1]) if found else 0


# -- tests -------------------------------------------------------------------------------------------------------------


def test_a_worker_a_pod_and_the_operator_are_killed_in_turn(world: World, namespace: str, calm: Run) -> None:
    with rank0s_watched(world, namespace) as rank0s:
        run = world.submit(training_run(world, namespace, "stormy", stages()))
        run.wait("the first stage has ended", lambda: run.stage("corpus").get("state") == "Succeeded", 120)
        kill_operator(world)  # between two stages

        saved = []
        run.reaches(STAGE, EVERY)
        saved.append(run.saved_step(STAGE))
        kill_worker(run, 1)
        run.wait("a second attempt works", lambda: _works(run, 2), 180)

        run.reaches(STAGE, saved[-1] + EVERY)
        assert resumed_after(run, 2) >= saved[-1] >= EVERY
        saved.append(run.saved_step(STAGE))
        kill_pod(run, 0)
        run.wait("a third attempt works", lambda: _works(run, 3), 180)

        run.reaches(STAGE, saved[-1] + EVERY)
        before = run.stage(STAGE)["attempts"][-1]
        kill_operator(world)  # while a stage trains: nobody notices
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


def _works(run: Run, attempt: int) -> bool:
    stage = run.stage(STAGE)
    return bool(stage.get("attempt") == attempt and stage["state"] == "Running")


def test_the_s3_server_is_away_for_a_minute(world: World, namespace: str, calm: Run) -> None:
    if world.own is None:
        pytest.skip("only the test cluster's own S3 server may be stopped")
    run = world.submit(training_run(world, namespace, "severed", stages()))
    with rank0s_watched(world, namespace) as rank0s:
        run.reaches(STAGE, EVERY)
        with world.without_s3():
            time.sleep(S3_AWAY_SECONDS)
        run.complete(420)
    assert run.contents() == calm.contents()
    assert (rank0s.together, rank0s.overlaps()) == ([], [])
    attempts = run.stage(STAGE)["attempts"]
    assert all(attempt.get("cause") in (None, "infrastructure") for attempt in attempts)
    if len(attempts) > 1:
        assert resumed_after(run, len(attempts)) >= EVERY
