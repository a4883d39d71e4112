"""What the pods of a cluster's attempt print, while they are there: all at once, each line with who said it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagecoach_api import names
from stagecoach_api.artifacts import RANK_MARK, rank_mark
from stagecoach_cli.cluster.api import Body, ClusterApi, ClusterError, UnknownObject, Unreachable, Unusable

LOOK_SECONDS = 1.0
"""How often new pods are looked for, and whether the attempt has ended."""
PATIENCE_SECONDS = 30.0
"""How long the last words of pods are waited for once their attempt has ended."""
MAX_FOLLOWED = 100
"""Pods that are followed at once, one thread each."""

ON_ITS_WAY = frozenset({"ContainerCreating", "PodInitializing"})


@dataclass(frozen=True)
class PodSight:
    """One pod of an attempt, as far as its log goes."""

    name: str
    uid: str
    index: int
    """Completion index: the node rank."""
    created: str
    has_started: bool
    """Its trainer has run, so there is a log."""
    has_ended: bool
    waiting: str = ""
    """Why the trainer has not started. Empty: it has, or nobody says."""


def pod_sight(body: Body) -> PodSight:
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
    return PodSight(
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
    """Which pods of an attempt are meant, and how their lines are told apart."""

    selector: str
    num_pods: int
    ranks_per_pod: int
    rank: int | None = None
    """Global rank whose pod is meant. None: all pods."""

    @property
    def num_listed(self) -> int:
        """How many pods are meant."""
        return self.num_pods if self.rank is None else 1

    def shown(self, index: int, text: str) -> str | None:
        """Return a line of the pod with this index as it is shown; None: it is another rank's than the one meant.

        A launcher of several ranks marks their lines by itself.
        """
        if self.rank is not None:
            mark = rank_mark(self.rank) if self.ranks_per_pod > 1 else ""
            return text.removeprefix(mark) if text.startswith(mark) else None
        if self.num_pods == 1 or (self.ranks_per_pod > 1 and text.startswith(RANK_MARK)):
            return text
        return f"{rank_mark(index)}{text}" if self.ranks_per_pod == 1 else f"[pod {index}] {text}"

    def find(self, api: ClusterApi) -> list[PodSight]:
        """Return the pods that there are now, by index and age."""
        wanted = None if self.rank is None else self.rank // self.ranks_per_pod
        sights = [pod_sight(item) for item in api.pods(self.selector)]
        return sorted(
            (sight for sight in sights if wanted in (None, sight.index)), key=lambda item: (item.index, item.created)
        )


def write_line(text: str) -> None:
    """Write one line of a log as it is."""
    sys.stdout.buffer.write(text.encode("utf-8", errors="replace") + b"\n")
    sys.stdout.buffer.flush()


def copy_logs(api: ClusterApi, pods: Sequence[PodSight], choice: PodChoice, tell: Callable[[str], None]) -> None:
    """Write what each pod has printed so far, one pod after the other. `tell`: says what is no log."""
    for pod in pods:
        if not pod.has_started:
            tell(f"{pod.name} has not started{f': {pod.waiting}' if pod.waiting else ''}")
            continue
        try:
            for _, text in api.log_lines(pod.name):
                shown = choice.shown(pod.index, text)
                if shown is not None:
                    write_line(shown)
        except UnknownObject:
            tell(f"{pod.name} is gone")


@dataclass
class Follower:
    """Follows all pods of an attempt, also those that take the place of others, until the attempt has ended."""

    api: ClusterApi
    choice: PodChoice
    is_over: Callable[[], bool]
    """Tells whether the attempt has ended; may raise Unreachable."""
    tell: Callable[[str], None]
    write: Callable[[str], None] = write_line
    pause: Callable[[float], Any] = time.sleep
    look_seconds: float = LOOK_SECONDS
    patience_seconds: float = PATIENCE_SECONDS

    _threads: dict[str, threading.Thread] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _error: ClusterError | OSError | None = None
    _away: bool = False
    _told_many: bool = False
    _waiting: dict[str, str] = field(default_factory=dict)

    def follow(self) -> int:
        """Return how many pods' logs were seen. Raises ClusterError that time does not heal, and OSError of `write`."""
        over_since: float | None = None
        while True:
            try:
                over = self.is_over()  # asked before the last look, so that no pod is missed
                self._look()
                self._away = False
            except Unreachable as error:
                over = False
                self._tell_away(error)
            if self._error is not None:
                raise self._error
            if over:
                over_since = time.monotonic() if over_since is None else over_since
                if not self._living() or time.monotonic() - over_since > self.patience_seconds:
                    return len(self._threads)
            self.pause(self.look_seconds)

    def _look(self) -> None:
        for pod in self.choice.find(self.api):
            if not pod.has_started:
                self._tell_waiting(pod)
                continue
            if pod.uid in self._threads:
                continue
            if len(self._living()) >= MAX_FOLLOWED:
                self._tell_many()
                continue
            thread = threading.Thread(target=self._run, args=(pod,), name=pod.name, daemon=True)
            self._threads[pod.uid] = thread
            thread.start()

    def _living(self) -> list[threading.Thread]:
        return [thread for thread in self._threads.values() if thread.is_alive()]

    def _tell_waiting(self, pod: PodSight) -> None:
        """Say why a pod does not start, unless it is only on its way."""
        if pod.waiting and pod.waiting not in ON_ITS_WAY and self._waiting.get(pod.uid) != pod.waiting:
            self._waiting[pod.uid] = pod.waiting
            self.tell(f"{pod.name} has not started: {pod.waiting}")

    def _tell_many(self) -> None:
        if not self._told_many:
            self.tell(
                f"there are more than {MAX_FOLLOWED} pods; the others follow as these end, or choose one by --rank"
            )
        self._told_many = True

    def _tell_away(self, error: Unreachable) -> None:
        if not self._away:
            self.tell(f"{error}; trying again")
        self._away = True

    def _run(self, pod: PodSight) -> None:
        """Follow one pod, in a thread of its own."""
        log = PodLog(self.api, pod.name, lambda text: self._say(pod, text), lambda: self.pause(self.look_seconds))
        try:
            log.copy()
        except UnknownObject:
            return  # it has been deleted, with its log
        except (ClusterError, OSError) as error:  # an OSError: nobody reads what is written any more
            self._error = error

    def _say(self, pod: PodSight, text: str) -> None:
        shown = self.choice.shown(pod.index, text)
        if shown is not None:
            with self._lock:
                self.write(shown)


@dataclass
class PodLog:
    """One pod's log, followed to its end; a connection that breaks is taken up where it was."""

    api: ClusterApi
    name: str
    write: Callable[[str], None]
    pause: Callable[[], Any]
    last: str = ""
    """Time stamp of the last line that was written."""

    def copy(self) -> None:
        """Write every line until the trainer has ended. Raises UnknownObject where the pod is gone."""
        while True:
            try:
                self._pass_on(follow=True)
                if pod_sight(self.api.pod(self.name)).has_ended:
                    self._pass_on(follow=False)  # what came between the end of the stream and that of the trainer
                    return
            except UnknownObject:
                raise
            except (Unreachable, Unusable):
                pass  # out of reach, which the main loop tells; or between two states, with a log in a moment
            self.pause()

    def _pass_on(self, follow: bool) -> None:
        since = self.last
        for stamp, text in self.api.log_lines(self.name, follow=follow, since=since):
            if stamp > since:  # the API server goes back to the whole second
                self.write(text)
                self.last = stamp
