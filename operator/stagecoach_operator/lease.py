"""Leader election: the active operator holds the Lease. A replica that loses it exits and restarts as a standby.

The identity is the pod's name, so a restarted container takes its Lease back without waiting.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from stagecoach_operator.kube import LEASES, AlreadyExists, Body, Conflict, Kube, KubeError, ObjectNotFound

log = logging.getLogger(__name__)

GIVE_UP_AFTER = 0.6
"""Share of the Lease's duration after which one that is not renewed counts as lost. The last call may take another
third, and still ends before another replica may take the Lease."""

Sleep = Callable[[float], Awaitable[None]]


@dataclass
class Lease:
    """The Lease, as this replica holds it or waits for it."""

    kube: Kube
    namespace: str
    name: str
    identity: str
    seconds: int
    """Duration: how long other replicas respect a Lease that is not renewed."""
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    sleep: Sleep = asyncio.sleep
    held: bool = False
    answered_at: float = field(default=float("-inf"))
    """When the API server last responded to a request for it (monotonic)."""
    _seen: tuple[str, str] = ("", "")
    _seen_at: float = float("-inf")
    _body: Body | None = None

    @property
    def pause_seconds(self) -> float:
        return self.seconds / 3

    async def acquire(self) -> None:
        """Wait until this replica holds the Lease."""
        while not self.held:
            try:
                await self._try()
            except KubeError as error:
                log.warning("lease %s: %s: %s", self.name, type(error).__name__, error)
            if not self.held:
                await self.sleep(min(2.0, self.pause_seconds))
        log.info("lease %s is held by %s", self.name, self.identity)

    async def keep(self) -> None:
        """Renew the Lease until it is lost: another replica holds it, or it could not be renewed in time."""
        renewed_at = self.clock()
        pause = self.pause_seconds
        while self.held:
            await self.sleep(pause)
            # After a failure: after another third of the duration, the second try would come later than GIVE_UP_AFTER.
            pause = 1.0
            try:
                await asyncio.wait_for(self._renew(), self.pause_seconds)
                renewed_at, pause = self.answered_at, self.pause_seconds
            except Conflict:
                await self._check_holder()
            except (KubeError, TimeoutError) as error:
                log.warning("lease %s could not be renewed: %s: %s", self.name, type(error).__name__, error)
            # Other replicas wait for the whole duration: this one must have stopped before.
            if self.clock() - renewed_at > self.seconds * GIVE_UP_AFTER:
                self.held = False
        log.error("lease %s is lost", self.name)

    async def release(self) -> None:
        """Release the Lease, so that another replica can take it at once."""
        if not self.held or self._body is None:
            return
        self.held = False
        # As client-go does: no holder, and the shortest valid duration, so that no replica waits for the expiry.
        body = {**self._body, "spec": {**self._body["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}}
        try:
            await self.kube.replace(LEASES, body)
        except KubeError as error:
            log.warning("lease %s could not be released: %s", self.name, error)

    # -- one request----------------------------------------------------------------------------------------------------

    async def _try(self) -> None:
        try:
            body = await self.kube.get(LEASES, self.namespace, self.name)
        except ObjectNotFound:
            await self._create()
            return
        self.answered_at = self.clock()
        spec = body.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        seen = holder, str(spec.get("renewTime") or "")
        if seen != self._seen:
            self._seen, self._seen_at = seen, self.clock()
        # Clocks of two machines differ, so renewTime is not compared with ours: as in client-go's leader election, a
        # Lease has expired once we have not seen it change for its whole duration.
        expired = self.clock() - self._seen_at > float(spec.get("leaseDurationSeconds") or self.seconds)
        if holder in ("", self.identity) or expired:
            try:
                self._body = await self.kube.replace(LEASES, {**body, "spec": self._spec(spec, holder)})
                self.held = True
            except Conflict:  # another replica was faster
                return

    async def _create(self) -> None:
        body = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": self._spec({}, ""),
        }
        try:
            self._body = await self.kube.create(LEASES, body)
        # Another replica was faster; the next try reads its Lease.
        except AlreadyExists:
            return
        self.answered_at = self.clock()
        self.held = True

    async def _renew(self) -> None:
        # With the resource version of our last write: if another replica took the Lease since, the response is 409.
        body = self._body or await self.kube.get(LEASES, self.namespace, self.name)
        self._body = await self.kube.replace(LEASES, {**body, "spec": self._spec(body["spec"], self.identity)})
        self.answered_at = self.clock()

    async def _check_holder(self) -> None:
        """Read the Lease after a 409. It is still ours if the change was our own renewal, whose response was lost."""
        try:
            self._body = await self.kube.get(LEASES, self.namespace, self.name)
        except KubeError as error:
            log.warning("lease %s: %s", self.name, error)
            return
        if (self._body.get("spec") or {}).get("holderIdentity") != self.identity:
            self.held = False

    def _spec(self, before: Body, holder: str) -> dict[str, Any]:
        stamp = self.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        changes = int(before.get("leaseTransitions") or 0) + (holder != self.identity)
        acquired = before.get("acquireTime") if holder == self.identity else stamp
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self.seconds,
            "acquireTime": acquired or stamp,
            "renewTime": stamp,
            "leaseTransitions": changes,
        }
