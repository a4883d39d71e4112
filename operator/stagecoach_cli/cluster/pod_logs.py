"""Logs of the pods of an attempt on a cluster, merged, each line with its rank."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagecoach_api import names
from stagecoach_api.artifacts import RANK_MARK, rank_mark
from stagecoach_cli.cluster.api import Body, ClusterApi, ClusterError, ClusterUnreachable, UnknownObject, Unusable

POLL_SECONDS = 1.0
"""Interval at which new pods and the end of the attempt are looked for."""
DRAIN_SECONDS = 30.0
"""Time to wait for the last lines of pods after their attempt has ended."""
MAX_FOLLOWED = 100
"""Pods that are followed at once, one thread each."""

NORMAL_STARTUP = frozenset({"ContainerCreating", "PodInitializing"})
"""Waiting reasons that are not worth a message."""


@dataclass(frozen=True)
class PodInfo:
    """The state of a pod of an attempt, as far as its log is concerned."""

    name: str
    uid: str
    index: int
    """Completion index: the node rank."""
    created: str
    has_started: bool
    """Its trainer has started, so there is a log."""
    has_ended: bool
    waiting: str = ""
    """Why the trainer has not started; empty if it has, or if no reason is known."""


def pod_info(body: Body) -> PodInfo:
    metadata, status = body["metadata"], body.get("status") or {}
    labels = {**(metadata.get("annotations") or {}), **(metadata.get("labels") or {})}
    states = {item.get("name"): item.get("state") or {} for item in status.get("containerStatuses") or ()}
    state = states.get(names.TRAINER_CONTAINER, {})
    waiting = state.get("waiting") or {}
    unscheduled = next(
        (
            item.get("message") or ""
            for item in status.get("conditions") or ()
            if (item.get("type"), item.get("status")) == ("PodScheduled", "False")
        ),
        "",
    )
    return PodInfo(
        name=metadata["name"],
        uid=metadata["uid"],
        index=int(labels.get(names.COMPLETION_INDEX, 0)),
        created=metadata.get("creationTimestamp") or "",
        has_started="running" in state or "terminated" in state,
        has_ended="terminated" in state or status.get("phase") in ("Succeeded", "Failed"),
        waiting=": ".join(str(waiting[key]) for key in ("reason", "message") if waiting.get(key)) or unscheduled,
    )


@dataclass(frozen=True)
class PodChoice:
    """The pods of an attempt whose logs are wanted, and how their lines are marked."""

    selector: str
    num_pods: int
    ranks_per_pod: int
    rank: int | None = None
    """Global rank whose log is wanted; None for all pods."""

    @property
    def num_wanted(self) -> int:
        """The number of wanted pods."""
        return self.num_pods if self.rank is None else 1

    def format_line(self, index: int, text: str) -> str | None:
        """Return a line of the pod with completion index `index` with its mark; None if it is another rank's line.

        A launcher of several ranks has already marked their lines.
        """
        if self.rank is not None:
            mark = rank_mark(self.rank) if self.ranks_per_pod > 1 else ""
            return text.removeprefix(mark) if text.startswith(mark) else None
        if self.num_pods == 1 or (self.ranks_per_pod > 1 and text.startswith(RANK_MARK)):
            return text
        return f"{rank_mark(index)}{text}" if self.ranks_per_pod == 1 else f"[pod {index}] {text}"

    def find(self, api: ClusterApi) -> list[PodInfo]:
        """Return the existing pods among the wanted ones, sorted by index and age."""
        wanted = None if self.rank is None else self.rank // self.ranks_per_pod
        pods = [pod_info(item) for item in api.pods(self.selector)]
        return sorted((pod for pod in pods if wanted in (None, pod.index)), key=lambda pod: (pod.index, pod.created))


def write_line(text: str) -> None:
    """Write one line of a log unchanged."""
    sys.stdout.buffer.write(text.encode("utf-8", errors="replace") + b"\n")
    sys.stdout.buffer.flush()


def copy_logs(api: ClusterApi, pods: Sequence[PodInfo], choice: PodChoice, notify: Callable[[str], None]) -> None:
    """Write the logs so far, one pod after the other. `notify`: shows messages that are not part of a log."""
    for pod in pods:
        if not pod.has_started:
            notify(f"{pod.name} has not started{f': {pod.waiting}' if pod.waiting else ''}")
            continue
        try:
            for _, text in api.log_lines(pod.name):
                line = choice.format_line(pod.index, text)
                if line is not None:
                    write_line(line)
        except UnknownObject:
            notify(f"{pod.name} has been deleted")


@dataclass
class Follower:
    """Follows all pods of an attempt, including replacements of deleted ones, until the attempt has ended."""

    api: ClusterApi
    choice: PodChoice
    is_over: Callable[[], bool]
    """Returns whether the attempt has ended; may raise ClusterUnreachable."""
    notify: Callable[[str], None]
    """Shows messages that are not part of a log."""
    write: Callable[[str], None] = write_line
    pause: Callable[[float], Any] = time.sleep
    poll_seconds: float = POLL_SECONDS
    drain_seconds: float = DRAIN_SECONDS

    _threads: dict[str, threading.Thread] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _error: ClusterError | OSError | None = None
    _is_unreachable: bool = False
    _limit_shown: bool = False
    _waiting: dict[str, str] = field(default_factory=dict)
    """The last waiting reason that was shown, by the pod's UID."""

    def follow(self) -> int:
        """Return the number of pods whose logs were followed. Raises ClusterError if retrying is of no use, and OSError
        from `write`."""
        over_since: float | None = None
        while True:
            try:
                over = self.is_over()  # before the pods are listed for the last time, so that none is missed
                self._follow_new_pods()
                self._is_unreachable = False
            except ClusterUnreachable as error:
                over = False
                self._notify_unreachable(error)
            if self._error is not None:
                raise self._error
            if over:
                over_since = time.monotonic() if over_since is None else over_since
                if not self._live() or time.monotonic() - over_since > self.drain_seconds:
                    return len(self._threads)
            self.pause(self.poll_seconds)

    def _follow_new_pods(self) -> None:
        for pod in self.choice.find(self.api):
            if not pod.has_started:
                self._notify_waiting(pod)
                continue
            if pod.uid in self._threads:
                continue
            if len(self._live()) >= MAX_FOLLOWED:
                self._notify_limit()
                continue
            thread = threading.Thread(target=self._run, args=(pod,), name=pod.name, daemon=True)
            self._threads[pod.uid] = thread
            thread.start()

    def _live(self) -> list[threading.Thread]:
        return [thread for thread in self._threads.values() if thread.is_alive()]

    def _notify_waiting(self, pod: PodInfo) -> None:
        """Show why a pod has not started, unless it is starting normally."""
        if pod.waiting and pod.waiting not in NORMAL_STARTUP and self._waiting.get(pod.uid) != pod.waiting:
            self._waiting[pod.uid] = pod.waiting
            self.notify(f"{pod.name} has not started: {pod.waiting}")

    def _notify_limit(self) -> None:
        if not self._limit_shown:
            self.notify(
                f"following the first {MAX_FOLLOWED} pods; the others follow as these end, or choose one with --rank"
            )
        self._limit_shown = True

    def _notify_unreachable(self, error: ClusterUnreachable) -> None:
        if not self._is_unreachable:
            self.notify(f"{error}; retrying")
        self._is_unreachable = True

    def _run(self, pod: PodInfo) -> None:
        """Follow one pod in its own thread."""
        log = PodLog(self.api, pod.name, lambda text: self._write(pod, text), lambda: self.pause(self.poll_seconds))
        try:
            log.copy()
        except UnknownObject:
            return  # it has been deleted, with its log
        except (ClusterError, OSError) as error:  # OSError: the reader of our output is gone
            self._error = error

    def _write(self, pod: PodInfo, text: str) -> None:
        line = self.choice.format_line(pod.index, text)
        if line is not None:
            with self._lock:
                self.write(line)


@dataclass
class PodLog:
    """One pod's log, followed to its end; after a broken connection it resumes at the next unwritten line."""

    api: ClusterApi
    name: str
    write: Callable[[str], None]
    pause: Callable[[], Any]
    last: str = ""
    """Time stamp of the last written line."""

    def copy(self) -> None:
        """Write every line until the trainer has ended. Raises UnknownObject if the pod has been deleted."""
        while True:
            try:
                self._copy_new_lines(follow=True)
                if pod_info(self.api.pod(self.name)).has_ended:
                    self._copy_new_lines(follow=False)  # lines between the end of the stream and of the trainer
                    return
            except UnknownObject:
                raise
            except (ClusterUnreachable, Unusable):
                pass  # unreachable, which the main loop reports; or the container is just starting
            self.pause()

    def _copy_new_lines(self, follow: bool) -> None:
        since = self.last
        for stamp, text in self.api.log_lines(self.name, follow=follow, since=since):
            if stamp > since:  # the API server rounds `since` down to the second
                self.write(text)
                self.last = stamp
