"""Lists every watched kind, once before the first decision and then periodically, to verify the watches.

A watch may be stale although its connection looks alive: it hangs, its RBAC permission was revoked, or it was restarted
and never reported what was deleted meanwhile. So lists are compared with the cache, and differences are repaired.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagecoach_core.manifests.labels import managed_selector
from stagecoach_operator.kube import (
    JOBSETS,
    PODS,
    TRAINING_RUNS,
    WORKLOADS,
    Body,
    Kube,
    KubeError,
    Listing,
    NotServed,
    RequestForbidden,
    Resource,
)
from stagecoach_operator.object_cache import Cache, Child, is_newer
from stagecoach_operator.object_views import (
    JobSetView,
    PodView,
    RunView,
    WorkloadView,
    jobset_view,
    pod_view,
    run_view,
    workload_view,
)

log = logging.getLogger(__name__)

AUDIT_SECONDS = 60.0
"""How often lists are compared with the cache."""

WATCHED = (TRAINING_RUNS, JOBSETS, PODS, WORKLOADS)
"""In the order in which they are listed: owners before what they own."""

OPTIONAL = frozenset({JOBSETS, WORKLOADS})
"""Kinds that need not be installed."""

VIEW_TYPES: Mapping[Resource, type[Any]] = {
    TRAINING_RUNS: RunView,
    JOBSETS: JobSetView,
    PODS: PodView,
    WORKLOADS: WorkloadView,
}
VIEWS: Mapping[Resource, Callable[[Body], Child]] = {JOBSETS: jobset_view, PODS: pod_view, WORKLOADS: workload_view}


def selector_of(resource: Resource) -> str:
    """Return the label selector for a kind. Runs and Workloads carry no label of ours."""
    return managed_selector() if resource in (JOBSETS, PODS) else ""


def store(cache: Cache, resource: Resource, body: Body) -> str | None:
    """Store an object in the cache; return the UID of the run to reconcile, or None if nothing has changed."""
    if resource == TRAINING_RUNS:
        view = run_view(body)
        return view.meta.uid if cache.put_run(view) else None
    return cache.put(VIEWS[resource](body))


def merged(listings: Sequence[Listing]) -> Listing:
    """Return the lists of several namespaces as one, with the oldest of their resource versions: what is missing from
    it and older was deleted."""
    items = tuple(item for listing in listings for item in listing.items)
    versions = [listing.resource_version for listing in listings]
    return Listing(items, min(versions, key=lambda version: int(version) if version.isdigit() else 0))


@dataclass
class WatchHealth:
    """Whether the watch of one kind delivers its events."""

    served: bool = True
    """Whether the kind is installed."""
    error: str = ""
    """Why it cannot be listed. Empty if it can."""
    missed: dict[str, str] = field(default_factory=dict)
    """Resource versions that the last list contained and the watch had not delivered, by UID."""
    healthy_at: float = 0.0
    """When the watch was last known to deliver (monotonic)."""


@dataclass
class Audit:
    """Fills the cache before the watches start, and repairs it if they miss something."""

    kube: Kube
    cache: Cache
    namespaces: Sequence[str] | None
    """Namespaces to list. None for all."""
    enqueue: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    watches: dict[Resource, WatchHealth] = field(default_factory=lambda: {item: WatchHealth() for item in WATCHED})
    appeared: bool = False
    """Whether a kind was installed, or a namespace became reachable, after the start. The watches do not discover it:
    the operator must restart."""
    _refused: dict[str, str] = field(default_factory=dict)
    """Why a namespace could not be listed at the start, by its name."""

    @property
    def reachable(self) -> Sequence[str] | None:
        """Namespaces that could be listed at the start. None for all."""
        return None if self.namespaces is None else [name for name in self.namespaces if name not in self._refused]

    async def cold_start(self) -> None:
        """Fill the cache with everything that exists. Raises KubeError if a mandatory kind cannot be listed."""
        await self._find_reachable()
        for resource in WATCHED:
            watch = self.watches[resource]
            try:
                listing = await self._list(resource, metadata_only=False)
            # 404 on the list: the CRD is not installed. Runs are accepted without JobSet; their status reports it.
            except NotServed:
                if resource not in OPTIONAL:
                    raise
                watch.served = False
                continue
            # Set before the first audit, so that a watch that never delivers anything becomes stale, too.
            watch.healthy_at = self.clock()
            for body in listing.items:
                store(self.cache, resource, body)

    async def _find_reachable(self) -> None:
        """Leave out namespaces that refuse lists. Raises RequestForbidden if all do.

        A namespace of several is deleted, or its RoleBinding removed, without notice; the runs of the others continue.
        """
        if self.namespaces is None or len(self.namespaces) == 1:
            return
        for namespace in self.namespaces:
            try:
                await self._try_lists(namespace)
            except RequestForbidden as error:
                self._refused[namespace] = str(error)
                log.warning("namespace %s is left out: %s", namespace, error)
        if not self.reachable:
            raise RequestForbidden("; ".join(self._refused.values()))

    async def _try_lists(self, namespace: str) -> None:
        for resource in WATCHED:
            with contextlib.suppress(NotServed):
                await self.kube.list(resource, namespace, labels=selector_of(resource), metadata_only=True)

    async def _try_refused(self) -> None:
        """Note whether a namespace that was left out can be listed now."""
        for namespace in self._refused:
            with contextlib.suppress(KubeError):
                await self._try_lists(namespace)
                log.warning("namespace %s can be listed now; restarting to watch it", namespace)
                self.appeared = True

    async def check(self) -> None:
        """Compare lists with the cache, repair differences, and note whether each watch delivers."""
        await self._try_refused()
        for resource in WATCHED:
            await self._check(resource)

    async def _check(self, resource: Resource) -> None:
        watch = self.watches[resource]
        try:
            listing = await self._list(resource, metadata_only=True)
        except NotServed:
            return
        # A watch is authorised when it is opened: only a list shows that the permission has been revoked since.
        except RequestForbidden as error:
            watch.error = f"{resource.plural} may not be listed: {error}"
            return
        # An outage does not count as a miss. It does not count as healthy either, so a long one becomes a problem.
        except KubeError as error:
            log.warning("audit of %s: %s", resource.plural, error)
            return
        if not watch.served:
            log.warning("%s are installed now; restarting to watch them", resource.plural)
            self.appeared = True
        watch.error = ""
        await self._compare(resource, watch, listing)

    async def _compare(self, resource: Resource, watch: WatchHealth, listing: Listing) -> None:
        listed = {item["metadata"]["uid"]: item["metadata"] for item in listing.items}
        known = self._known(resource)
        for uid in [uid for uid in known if uid not in listed]:
            # The list proves a deletion only if it is not older than the object: our own create may be newer than it.
            if is_newer(listing.resource_version, known[uid]) or listing.resource_version == known[uid]:
                log.warning("%s %s was deleted, and the watch did not report it", resource.kind, uid)
                run_uid = self.cache.remove(uid)
                if run_uid is not None:
                    self.enqueue(run_uid)
        newer = {
            uid: str(metadata["resourceVersion"])
            for uid, metadata in listed.items()
            if self._is_ours(resource, metadata, known)
            and is_newer(str(metadata["resourceVersion"]), known.get(uid, "0"))
        }
        # A version may be listed before its event arrives. It was missed if the previous list already contained it.
        missed = [uid for uid, version in newer.items() if watch.missed.get(uid) == version]
        for uid in missed:
            await self._repair(resource, listed[uid])
        # A kind without changes is silent for hours, so the age of the last event cannot show whether a watch is alive.
        if not missed:
            watch.healthy_at = self.clock()
        watch.missed = newer

    def _known(self, resource: Resource) -> dict[str, str]:
        """Return the resource versions in the cache, by UID."""
        kind = VIEW_TYPES[resource]
        views: Mapping[str, RunView | Child] = self.cache.runs if kind is RunView else self.cache.children
        return {uid: view.meta.resource_version for uid, view in views.items() if isinstance(view, kind)}

    def _is_ours(self, resource: Resource, metadata: Body, known: Mapping[str, str]) -> bool:
        """Return whether the cache would store an object: Workloads only if they belong to our JobSets."""
        if resource != WORKLOADS or metadata["uid"] in known:
            return True
        # Workloads of other controllers are never stored, and would look like missed changes at every audit.
        owners = {item.get("uid") for item in metadata.get("ownerReferences") or ()}
        return any(uid in self.cache.children for uid in owners)

    async def _repair(self, resource: Resource, metadata: Body) -> None:
        log.warning("the watch of %s missed a change of %s; reading it", resource.plural, metadata["name"])
        try:
            # A list instead of a get: an object that was deleted meanwhile is an empty result, not a 404.
            listing = await self.kube.list(resource, metadata["namespace"], fields=f"metadata.name={metadata['name']}")
        except KubeError as error:
            log.warning("%s %s: %s", resource.kind, metadata["name"], error)
            return
        for body in listing.items:
            run_uid = store(self.cache, resource, body)
            if run_uid is not None:
                self.enqueue(run_uid)

    async def _list(self, resource: Resource, metadata_only: bool) -> Listing:
        selector = selector_of(resource)
        namespaces = [None] if self.reachable is None else self.reachable
        return merged(
            [await self.kube.list(resource, item, selector, metadata_only=metadata_only) for item in namespaces]
        )

    def problems(self, stale_after_seconds: float) -> list[str]:
        """Return a message for each kind that may not be listed, or whose watch has been stale for too long."""
        now = self.clock()
        problems = []
        for resource, watch in self.watches.items():
            if watch.error:
                problems.append(watch.error)
            elif watch.served and watch.healthy_at and now - watch.healthy_at > stale_after_seconds:
                problems.append(f"the watch of {resource.plural} has missed changes for {now - watch.healthy_at:.0f} s")
        return problems
