"""One active operator: whoever holds the Lease. Who loses it ends at once, and starts anew as a stand-by.

The identity is the pod's name, so that a container that is restarted takes its Lease back without waiting.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from stagecoach_operator.kube import LEASES, AlreadyExists, Body, Conflict, Kube, KubeError, NotFound

log = logging.getLogger(__name__)

GIVE_UP_AFTER = 0.6
"""Share of the Lease's duration after which one that is not renewed counts as lost; a last call may take a third."""

Sleep = Callable[[float], Awaitable[None]]


@dataclass
class Lease:
    """The right to work, for a while at a time."""

    kube: Kube
    namespace: str
    name: str
    identity: str
    seconds: int
    """How long a Lease that is not renewed is respected."""
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    sleep: Sleep = asyncio.sleep
    held: bool = False
    answered_at: float = field(default=float("-inf"))
    """When the API server last answered about it (monotonic)."""
    _seen: tuple[str, str] = ("", "")
    _seen_at: float = float("-inf")
    _body: Body | None = None

    @property
    def pause_seconds(self) -> float:
        return self.seconds / 3

    async def acquire(self) -> None:
        """Wait until the Lease is ours."""
        while not self.held:
            try:
                await self._try()
            except KubeError as error:
                log.warning("lease %s: %s: %s", self.name, type(error).__name__, error)
            if not self.held:
                await self.sleep(min(2.0, self.pause_seconds))
        log.info("lease %s is held by %s", self.name, self.identity)

    async def keep(self) -> None:
        """Renew the Lease until it is lost: another one has it, or it could not be renewed in time."""
        renewed_at = self.clock()
        pause = self.pause_seconds
        while self.held:
            await self.sleep(pause)
            pause = 1.0
            try:
                await asyncio.wait_for(self._renew(), self.pause_seconds)
                renewed_at, pause = self.answered_at, self.pause_seconds
            except Conflict:
                await self._look_again()
            except (KubeError, TimeoutError) as error:
                log.warning("lease %s could not be renewed: %s: %s", self.name, type(error).__name__, error)
            # Others wait for the whole of it: we must be gone before.
            if self.clock() - renewed_at > self.seconds * GIVE_UP_AFTER:
                self.held = False
        log.error("lease %s is lost", self.name)

    async def release(self) -> None:
        """Give the Lease up, so that another one need not wait."""
        if not self.held or self._body is None:
            return
        self.held = False
        body = {**self._body, "spec": {**self._body["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}}
        try:
            await self.kube.replace(LEASES, body)
        except KubeError as error:
            log.warning("lease %s could not be given up: %s", self.name, error)

    # -- one try -------------------------------------------------------------------------------------------------------

    async def _try(self) -> None:
        try:
            body = await self.kube.get(LEASES, self.namespace, self.name)
        except NotFound:
            await self._create()
            return
        self.answered_at = self.clock()
        spec = body.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        seen = holder, str(spec.get("renewTime") or "")
        if seen != self._seen:
            self._seen, self._seen_at = seen, self.clock()
        # Clocks of two machines differ: a Lease has run out when we have not seen it change for its whole duration.
        expired = self.clock() - self._seen_at > float(spec.get("leaseDurationSeconds") or self.seconds)
        if holder in ("", self.identity) or expired:
            try:
                self._body = await self.kube.replace(LEASES, {**body, "spec": self._spec(spec, holder)})
                self.held = True
            except Conflict:
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
        except AlreadyExists:
            return
        self.answered_at = self.clock()
        self.held = True

    async def _renew(self) -> None:
        body = self._body or await self.kube.get(LEASES, self.namespace, self.name)
        self._body = await self.kube.replace(LEASES, {**body, "spec": self._spec(body["spec"], self.identity)})
        self.answered_at = self.clock()

    async def _look_again(self) -> None:
        """The Lease has changed: it is still ours only if our own renewal was the change."""
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
