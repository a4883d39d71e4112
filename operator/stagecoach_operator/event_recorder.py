"""Posts events in the background: they must neither delay a turn nor fail one, and each is posted once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from stagecoach_operator.events import RunEvent, event_body
from stagecoach_operator.kube import EVENTS, AlreadyExists, Kube, KubeError
from stagecoach_operator.watched import RunView

log = logging.getLogger(__name__)

MAX_WAITING = 1000
"""Events beyond this are dropped: they are for people, and more than that nobody reads."""
MAX_REMEMBERED = 5000


class Poster:
    """Posts events one after the other."""

    def __init__(self, kube: Kube, clock: Callable[[], float] = time.time) -> None:
        self._kube = kube
        self._clock = clock
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_WAITING)
        self._posted: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    def post(self, run: RunView, events: Sequence[RunEvent]) -> None:
        """Post events, some time; those said before are not said again."""
        for event in events:
            body = event_body(run, event, self._clock())
            name = f"{run.meta.namespace}/{body['metadata']['name']}"
            if name in self._posted or self._waiting.full():
                continue
            self._posted[name] = None
            while len(self._posted) > MAX_REMEMBERED:
                del self._posted[next(iter(self._posted))]
            self._waiting.put_nowait(body)
        if self._task is None and not self._waiting.empty():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self, seconds: float = 3.0) -> None:
        """Post what waits, if that is quick."""
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=seconds)
            for task in late:
                task.cancel()

    async def _work(self) -> None:
        while not self._waiting.empty():
            body = self._waiting.get_nowait()
            try:
                await self._kube.create(EVENTS, body)
            except AlreadyExists:
                continue
            except KubeError as error:
                log.warning("event %s: %s", body["reason"], error)
        self._task = None
