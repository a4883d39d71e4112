"""The newest known version of every watched object.

The cache is filled from two sources without a common order: the watches, and the responses to our own writes. Resource
versions determine which is newer. Own writes are visible at once, so the next decision cannot repeat them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from stagecoach_operator.lost_nodes import Patience, is_ignored
from stagecoach_operator.object_views import JobSetView, Meta, PodView, RunView, WorkloadView

Child = JobSetView | PodView | WorkloadView

TOMBSTONES = 20_000
"""How many UIDs of deleted objects are remembered, so that a late response about one does not restore it."""

MAX_EARLY = 2000
"""How many Workloads of unknown JobSets are kept. Most of them belong to other controllers' JobSets."""


@dataclass
class Cache:
    """Runs and the objects that belong to them, as the operator knows them."""

    runs: dict[str, RunView] = field(default_factory=dict)
    """By UID."""
    children: dict[str, Child] = field(default_factory=dict)
    """By UID."""
    _of_run: dict[str, set[str]] = field(default_factory=dict)
    _run_of: dict[str, str] = field(default_factory=dict)
    """UID of the run by that of the object; a Workload may outlive the JobSet through which its run was found."""
    _run_of_jobset: dict[str, str] = field(default_factory=dict)
    _gone: dict[str, None] = field(default_factory=dict)
    _early: dict[str, WorkloadView] = field(default_factory=dict)
    """Workloads of JobSets that are not known, either not yet or because they are not ours, by the JobSets' UID."""

    def put_run(self, view: RunView) -> bool:
        """Store a run; return whether it is newer than the stored one."""
        if not self._is_new(view.meta, self.runs.get(view.meta.uid)):
            return False
        self.runs[view.meta.uid] = view
        return True

    def put(self, view: Child) -> str | None:
        """Store an object; return the UID of its run, or None if it is not newer than the stored one, or not ours."""
        run_uid = self.run_of(view)
        if run_uid is None and isinstance(view, WorkloadView):
            self._keep_early(view)
        if run_uid is None or not self._is_new(view.meta, self.children.get(view.meta.uid)):
            return None
        self.children[view.meta.uid] = view
        self._of_run.setdefault(run_uid, set()).add(view.meta.uid)
        self._run_of[view.meta.uid] = run_uid
        if isinstance(view, JobSetView):
            self._run_of_jobset[view.meta.uid] = run_uid
            # Its Workload may have been delivered before it, and is not delivered again until it changes.
            early = self._early.pop(view.meta.uid, None)
            if early is not None:
                self.put(early)
        return run_uid

    def _keep_early(self, view: WorkloadView) -> None:
        """Keep a Workload that arrives before its JobSet: events of two watches have no order between them."""
        if not view.jobset_uid or view.meta.uid in self._gone:
            return
        known = self._early.get(view.jobset_uid)
        if known is None or self._is_new(view.meta, known):
            self._early[view.jobset_uid] = view
        # Dictionaries keep insertion order, so the first is the oldest. If it was ours, the audit reads it again.
        while len(self._early) > MAX_EARLY:
            del self._early[next(iter(self._early))]

    def remove(self, uid: str) -> str | None:
        """Drop a deleted object; return the UID of the run it belonged to (or was), or None if it was not known."""
        # Also if the UID is unknown: the response to our own create may arrive after the watch's deletion event.
        self._gone[uid] = None
        while len(self._gone) > TOMBSTONES:
            del self._gone[next(iter(self._gone))]
        if self.runs.pop(uid, None) is not None:
            return uid
        child = self.children.pop(uid, None)
        if child is None:
            self._early = {key: view for key, view in self._early.items() if view.meta.uid != uid}
            return None
        self._run_of_jobset.pop(uid, None)
        run_uid = self._run_of.pop(uid)
        self._of_run[run_uid].discard(uid)
        if not self._of_run[run_uid]:
            del self._of_run[run_uid]
        return run_uid

    def restore(self, view: Child) -> None:
        """Store an object that was just read, although it was removed: its watch reports one whose labels are taken off
        as deleted."""
        self._gone.pop(view.meta.uid, None)
        self.put(view)

    def mark_deleting(self, uid: str) -> None:
        """Mark an object as being deleted after our own request, before the watch reports it."""
        child = self.children.get(uid)
        if child is not None:
            # The resource version stays: the watch's event about the deletion is newer, and must still be stored.
            self.children[uid] = replace(child, meta=replace(child.meta, deleting=True))

    def run_of(self, view: Child) -> str | None:
        """Return the UID of the run an object belongs to, or None if it is not known."""
        if isinstance(view, WorkloadView):
            return self._run_of_jobset.get(view.jobset_uid)
        return view.run_uid or None

    def of_run(self, run_uid: str) -> Children:
        """Return the objects that belong to a run."""
        # Sorted: the order of a set of strings differs between processes.
        members = [self.children[uid] for uid in sorted(self._of_run.get(run_uid, ()))]
        return Children(
            jobsets=tuple(item for item in members if isinstance(item, JobSetView)),
            pods=tuple(item for item in members if isinstance(item, PodView)),
            workloads={item.jobset_uid: item for item in members if isinstance(item, WorkloadView)},
        )

    def remains_of(self, digest: str, patience: Patience, now: float) -> str:
        """Return a pod or JobSet at a stage digest that outlives its run, as text. Empty if there is none."""
        for child in self.children.values():
            if isinstance(child, WorkloadView) or child.digest != digest or self._lives(child.run_uid):
                continue
            if isinstance(child, PodView) and not is_ignored(child, now, patience):
                return f"pod {child.meta.name}"
            if isinstance(child, JobSetView) and not (child.meta.deleting or child.completed or child.failed):
                return f"JobSet {child.meta.name}"
        return ""

    def _lives(self, run_uid: str) -> bool:
        return run_uid in self.runs and not self.runs[run_uid].meta.deleting

    def _is_new(self, meta: Meta, known: RunView | Child | None) -> bool:
        if meta.uid in self._gone:
            return False
        return known is None or is_newer(meta.resource_version, known.meta.resource_version)


def is_newer(version: str, than: str) -> bool:
    """Compare resource versions numerically; any difference counts as newer if they are not decimal numbers.

    Kubernetes guarantees since 1.35 (KEP-5504) that those of one resource are comparable decimal numbers; with etcd
    they were so before.
    """
    if version.isdigit() and than.isdigit():
        return int(version) > int(than)
    return version != than


@dataclass(frozen=True)
class Children:
    """The objects that belong to one run."""

    jobsets: tuple[JobSetView, ...] = ()
    pods: tuple[PodView, ...] = ()
    workloads: Mapping[str, WorkloadView] = field(default_factory=dict)
    """By UID of their JobSet."""

    def pods_of(self, stage: str, number: int) -> tuple[PodView, ...]:
        """Return the pods of an attempt, sorted by index; of each index the newest comes first."""
        own = [pod for pod in self.pods if (pod.stage, pod.number) == (stage, number)]
        return tuple(sorted(own, key=lambda pod: (pod.index, -pod.meta.created)))

    def by_own_clock(self, seen: dict[str, float], now: float) -> Children:
        """Return the objects with the ends of their grace periods by this operator's clock, not the API server's.

        `seen`: when each was first seen to be deleted, by UID; updated. `now`: seconds since the epoch.
        """
        views: tuple[JobSetView | PodView, ...] = (*self.jobsets, *self.pods)
        known = {item.meta.uid: seen.get(item.meta.uid, now) for item in views if item.meta.delete_by}
        seen.clear()
        seen.update(known)
        if not known:
            return self

        def on_time(meta: Meta) -> Meta:
            return replace(meta, delete_by=known[meta.uid] + meta.grace_seconds) if meta.delete_by else meta

        return replace(
            self,
            jobsets=tuple(replace(item, meta=on_time(item.meta)) for item in self.jobsets),
            pods=tuple(replace(item, meta=on_time(item.meta)) for item in self.pods),
        )


def oldest_first(views: Iterable[RunView]) -> list[RunView]:
    """Sort runs by creation, oldest first."""
    return sorted(views, key=lambda view: (view.meta.created, view.meta.uid))
