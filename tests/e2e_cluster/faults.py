"""Faults for the end-to-end suite, and a watch that no stage ever has two rank 0s."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise

from stagecoach_api import names
from tests.e2e_cluster.world import RELEASE, SYSTEM, Run, World

# -- two rank 0s -------------------------------------------------------------------------------------------------------


@dataclass
class Rank0s:
    """When the containers of a stage's pods with index 0 ran, polled from the API server."""

    world: World
    namespace: str
    stage: str
    stop: threading.Event = field(default_factory=threading.Event)
    seen: dict[str, tuple[datetime, datetime | None]] = field(default_factory=dict)
    """Start and end by the pod's UID; the end is None if it was running when it was last seen."""
    together: list[set[str]] = field(default_factory=list)
    """Sets of pods whose containers were seen running at the same time."""

    def poll(self) -> None:
        running = set()
        for pod in self.world.list(
            "pods", self.namespace, {names.LABEL_STAGE: self.stage, names.COMPLETION_INDEX: "0"}
        ):
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
            self.poll()
            self.stop.wait(0.3)

    def overlaps(self) -> list[tuple[str, str]]:
        """Return pairs of pods of which the second started before the first ended."""
        ordered = sorted(self.seen.items(), key=lambda item: item[1][0])
        return [
            (one, other)
            for (one, (_, ended)), (other, (began, _)) in pairwise(ordered)
            if ended is not None and began < ended
        ]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


@contextmanager
def rank0s_watched(world: World, namespace: str, stage: str) -> Iterator[Rank0s]:
    watched = Rank0s(world, namespace, stage)
    thread = threading.Thread(target=watched.watch, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        watched.stop.set()
        thread.join()


# -- killing -----------------------------------------------------------------------------------------------------------


def pod_of(run: Run, stage: str, index: int) -> str:
    """Return the running pod of a stage with an index."""
    (found,) = [
        pod["metadata"]["name"]
        for pod in run.pods(stage)
        if pod["metadata"]["labels"][names.COMPLETION_INDEX] == str(index) and pod["status"]["phase"] == "Running"
    ]
    return str(found)


def kill_worker(run: Run, stage: str, rank: int) -> None:
    """Kill a rank's process, not its launcher."""
    code = (
        "import os, pathlib, signal; "
        f"path = pathlib.Path('{names.WORK_FOLDER}/outcomes/rank-{rank:05d}.pid'); "
        "os.kill(int(path.read_text()), signal.SIGKILL)"
    )
    run.world.kubectl("exec", pod_of(run, stage, rank), f"-n{run.namespace}", "--", "python", "-c", code)


def kill_pod(run: Run, stage: str, index: int) -> None:
    """Delete a pod with a grace period of one second."""
    pod = pod_of(run, stage, index)
    run.world.kubectl("delete", "pod", pod, f"-n{run.namespace}", "--grace-period=1", "--wait=false")


def kill_operator(world: World) -> None:
    """Delete all replicas of the operator at once, and wait until the deployment is available again."""
    selector = f"--selector=app.kubernetes.io/instance={RELEASE}"
    world.kubectl("delete", "pods", f"-n{SYSTEM}", selector, "--grace-period=0", "--force")
    world.kubectl("rollout", "status", f"deployment/{RELEASE}", f"-n{SYSTEM}", "--timeout=120s")


def works(run: Run, stage: str, attempt: int) -> bool:
    """Return whether an attempt of a stage is running."""
    found = run.stage(stage)
    return bool(found.get("attempt") == attempt and found["state"] == "Running")
