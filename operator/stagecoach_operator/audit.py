"""Lists beside the watches: once before anything is decided, and again and again to see whether the watches hear.

A watch may be deaf while it looks alive: its connection hangs, its right was taken away, or it began anew and never
told of what was deleted meanwhile. So what is listed is compared with what was heard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stagecoach_core.manifests.labels import managed_selector
from stagecoach_operator.kube import (
    JOBSETS,
    PODS,
    TRAINING_RUNS,
    WORKLOADS,
    Body,
    Forbidden,
    Kube,
    KubeError,
    Listing,
    NotServed,
    Resource,
)
from stagecoach_operator.watched import (
    Cache,
    Child,
    JobSetView,
    PodView,
    RunView,
    WorkloadView,
    is_newer,
    jobset_view,
    pod_view,
    run_view,
    workload_view,
)

log = logging.getLogger(__name__)

AUDIT_SECONDS = 60.0
"""How often lists are compared with what was heard."""

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
    """Return the label selector of what is watched of a kind. Runs and Workloads are not ours to label."""
    return managed_selector() if resource in (JOBSETS, PODS) else ""


def take(cache: Cache, resource: Resource, body: Body) -> str | None:
    """Take an object into the cache; return the UID of the run it is news for. None: it is no news."""
    if resource == TRAINING_RUNS:
        view = run_view(body)
        return view.meta.uid if cache.put_run(view) else None
    return cache.put(VIEWS[resource](body))


@dataclass
class Hearing:
    """How well the watch of one kind hears."""

    served: bool = True
    """The kind is installed."""
    trouble: str = ""
    """Why it cannot be listed. Empty: it can."""
    unheard: dict[str, str] = field(default_factory=dict)
    """Resource versions that the last list showed and the watch had not told, by UID."""
    heard_at: float = 0.0
    """When the watch was last known to hear (monotonic)."""


@dataclass
class Audit:
    """Fills the cache before the watches begin, and repairs it when they miss something."""

    kube: Kube
    cache: Cache
    namespace: str | None
    wake: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    hearings: dict[Resource, Hearing] = field(default_factory=lambda: {item: Hearing() for item in WATCHED})
    appeared: bool = False
    """A kind was installed after the watches began: they do not look for it again, so the operator must start anew."""

    async def cold_start(self) -> None:
        """Take everything in that exists. Raises KubeError where what must be there cannot be listed."""
        for resource in WATCHED:
            hearing = self.hearings[resource]
            try:
                listing = await self._list(resource, metadata_only=False)
            except NotServed:
                if resource not in OPTIONAL:
                    raise
                hearing.served = False
                continue
            hearing.heard_at = self.clock()
            for body in listing.items:
                take(self.cache, resource, body)

    async def check(self) -> None:
        """Compare lists with what was heard. What is missing is repaired, and deafness is noted."""
        for resource in WATCHED:
            await self._check(resource)

    async def _check(self, resource: Resource) -> None:
        hearing = self.hearings[resource]
        try:
            listing = await self._list(resource, metadata_only=True)
        except NotServed:
            return
        except Forbidden as error:
            hearing.trouble = f"{resource.plural} may not be listed: {error}"
            return
        except KubeError as error:
            log.warning("audit of %s: %s", resource.plural, error)
            return
        if not hearing.served:
            log.warning("%s are installed now; starting anew to watch them", resource.plural)
            self.appeared = True
        hearing.trouble = ""
        await self._compare(resource, hearing, listing)

    async def _compare(self, resource: Resource, hearing: Hearing, listing: Listing) -> None:
        listed = {item["metadata"]["uid"]: item["metadata"] for item in listing.items}
        known = self._known(resource)
        for uid in [uid for uid in known if uid not in listed]:
            if is_newer(listing.resource_version, known[uid]) or listing.resource_version == known[uid]:
                log.warning("%s %s is gone, and the watch did not say so", resource.kind, uid)
                run_uid = self.cache.remove(uid)
                if run_uid is not None:
                    self.wake(run_uid)
        newer = {
            uid: str(metadata["resourceVersion"])
            for uid, metadata in listed.items()
            if self._is_ours(resource, metadata, known)
            and is_newer(str(metadata["resourceVersion"]), known.get(uid, "0"))
        }
        deaf = [uid for uid, version in newer.items() if hearing.unheard.get(uid) == version]
        for uid in deaf:
            await self._repair(resource, listed[uid])
        if not deaf:
            hearing.heard_at = self.clock()
        hearing.unheard = newer

    def _known(self, resource: Resource) -> dict[str, str]:
        """Return the resource versions in the cache, by UID."""
        kind = VIEW_TYPES[resource]
        views: Mapping[str, RunView | Child] = self.cache.runs if kind is RunView else self.cache.children
        return {uid: view.meta.resource_version for uid, view in views.items() if isinstance(view, kind)}

    def _is_ours(self, resource: Resource, metadata: Body, known: Mapping[str, str]) -> bool:
        """Tell whether the cache would hold an object: not the Workloads of others."""
        if resource != WORKLOADS or metadata["uid"] in known:
            return True
        owners = {item.get("uid") for item in metadata.get("ownerReferences") or ()}
        return any(uid in self.cache.children for uid in owners)

    async def _repair(self, resource: Resource, metadata: Body) -> None:
        log.warning("the watch of %s has not told of %s; it is read", resource.plural, metadata["name"])
        try:
            listing = await self.kube.list(
                resource, metadata.get("namespace") or self.namespace, fields=f"metadata.name={metadata['name']}"
            )
        except KubeError as error:
            log.warning("%s %s: %s", resource.kind, metadata["name"], error)
            return
        for body in listing.items:
            run_uid = take(self.cache, resource, body)
            if run_uid is not None:
                self.wake(run_uid)

    async def _list(self, resource: Resource, metadata_only: bool) -> Listing:
        return await self.kube.list(resource, self.namespace, labels=selector_of(resource), metadata_only=metadata_only)

    def complaints(self, deaf_after_seconds: float) -> list[str]:
        """Return what is wrong with the watches: kinds that may not be listed, or have been deaf for too long."""
        now = self.clock()
        found = []
        for resource, hearing in self.hearings.items():
            if hearing.trouble:
                found.append(hearing.trouble)
            elif hearing.served and hearing.heard_at and now - hearing.heard_at > deaf_after_seconds:
                found.append(f"the watch of {resource.plural} has been deaf for {now - hearing.heard_at:.0f} s")
        return found
