"""Streams of the API server's watches, and the watch of pods that times both sides."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from kubernetes.client import CoreV1Api
from kubernetes.watch.watch import iter_resp_lines

from bench.handover.bench_cluster import BenchCluster
from stagecoach_api import names

WATCH_SECONDS = 3600

StageOfRun = tuple[str, str]
"""Names of run (or chain) and stage, from a pod's labels."""


def events(response: Any) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield a watch's events, each with the time (monotonic) at which it arrived, before it is parsed."""
    if response.status != 200:
        raise RuntimeError(f"the API server rejected a watch: {response.status}: {response.data.decode()}")
    for line in iter_resp_lines(response):
        at = time.monotonic()
        if line:
            yield at, json.loads(line)


class PodWatch:
    """Watches the pods of all chains in a separate thread."""

    def __init__(self, cluster: BenchCluster) -> None:
        self._changed = threading.Condition()
        self._created: dict[StageOfRun, float] = {}
        self._ended: dict[StageOfRun, float] = {}
        self._there: set[str] = set()
        self._trouble = ""
        self._response = CoreV1Api(cluster.api).list_namespaced_pod(
            cluster.namespace,
            watch=True,
            label_selector=f"{names.LABEL_RUN},{names.LABEL_STAGE}",
            timeout_seconds=WATCH_SECONDS,
            _preload_content=False,
        )
        threading.Thread(target=self._listen, name="pods", daemon=True).start()

    def handover_milliseconds(self, before: StageOfRun, after: StageOfRun) -> float:
        """Return the time from the end of a stage's last pod to the creation of the next stage's first pod."""
        with self._changed:
            return 1000 * (self._created[after] - self._ended[before])

    def end_of(self, stage: StageOfRun) -> float:
        """Return when the last pod of a stage succeeded, in seconds since the epoch."""
        with self._changed:
            return self._ended[stage] + time.time() - time.monotonic()

    def wait_for_end(self, stage: StageOfRun, seconds: float) -> None:
        """Wait until a stage's pod has succeeded. Raises RuntimeError if it fails or on timeout."""
        self._wait(f"the pod of {'/'.join(stage)} succeeds", lambda: stage in self._ended, seconds)

    def wait_until_gone(self, seconds: float) -> None:
        """Wait until no pod is left."""
        self._wait("all pods are gone", lambda: not self._there, seconds)

    def _wait(self, what: str, holds: Callable[[], bool], seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: holds() or bool(self._trouble), seconds)
            if not holds():
                raise RuntimeError(self._trouble or f"timeout after {seconds:.0f} s, waiting until {what}")

    def _listen(self) -> None:
        try:
            for at, event in events(self._response):
                with self._changed:
                    self._handle(at, event["type"], event["object"])
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._trouble = self._trouble or "the watch of pods has ended"
                self._changed.notify_all()

    def _handle(self, at: float, kind: str, pod: dict[str, Any]) -> None:
        if kind not in ("ADDED", "MODIFIED", "DELETED"):
            self._trouble = f"the watch of pods sent {kind}: {pod.get('message')}"
            return
        metadata, phase = pod["metadata"], pod.get("status", {}).get("phase")
        stage = metadata["labels"][names.LABEL_RUN], metadata["labels"][names.LABEL_STAGE]
        if kind == "DELETED":
            self._there.discard(metadata["uid"])
            return
        self._there.add(metadata["uid"])
        if kind == "ADDED":
            self._created.setdefault(stage, at)
        if phase == "Succeeded":
            self._ended.setdefault(stage, at)
        elif phase == "Failed":
            self._trouble = f"pod {metadata['name']} failed"
