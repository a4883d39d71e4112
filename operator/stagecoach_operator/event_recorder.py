"""Posts events in the background: they must neither delay nor fail a reconciliation, and each is posted once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from stagecoach_operator.events import RunEvent, event_body
from stagecoach_operator.kube import EVENTS, AlreadyExists, Kube, KubeError
from stagecoach_operator.object_views import RunView

log = logging.getLogger(__name__)

MAX_QUEUED = 1000
"""Events beyond this are dropped: they are for human readers, who would not read more."""
MAX_REMEMBERED = 5000
"""How many posted events are remembered by name."""


class EventRecorder:
    """Posts events one after the other."""

    def __init__(self, kube: Kube, clock: Callable[[], float] = time.time) -> None:
        self._kube = kube
        self._clock = clock
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_QUEUED)
        self._posted: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    def record(self, run: RunView, events: Sequence[RunEvent]) -> None:
        """Queue events for posting. Those recorded before are not posted again."""
        for event in events:
            body = event_body(run, event, self._clock())
            name = f"{run.meta.namespace}/{body['metadata']['name']}"
            if name in self._posted or self._queue.full():
                continue
            self._posted[name] = None
            while len(self._posted) > MAX_REMEMBERED:
                del self._posted[next(iter(self._posted))]
            self._queue.put_nowait(body)
        if self._task is None and not self._queue.empty():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self, seconds: float = 3.0) -> None:
        """Post the queued events; drop those not posted within `seconds`."""
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=seconds)
            for task in late:
                task.cancel()

    async def _work(self) -> None:
        while not self._queue.empty():
            body = self._queue.get_nowait()
            try:
                await self._kube.create(EVENTS, body)
            except AlreadyExists:  # posted by this operator before a restart: names are derived from contents
                continue
            except KubeError as error:
                log.warning("event %s: %s", body["reason"], error)
        self._task = None
