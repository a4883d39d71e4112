"""Progress of long work: a bar on a terminal, JSON lines for whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from stagecoach_api.progress import ProgressEvent

MIN_SECONDS_BETWEEN_EVENTS = 0.5


class Progress:
    """Appends `ProgressEvent`s to a file, at most one per half second and activity; the newest line is the heartbeat.

    Only rank 0 is given a path; elsewhere nothing is written.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._last_time = float("-inf")
        self._last_activity = ""

    def report(
        self,
        activity: str,
        done: float = 0.0,
        total: float | None = None,
        unit: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Say what is being done and how far it is; cheap enough for every step."""
        now = self._clock()
        finished = total is not None and done >= total
        recent = now - self._last_time < MIN_SECONDS_BETWEEN_EVENTS
        if self._path is None or (recent and activity == self._last_activity and not finished):
            return
        event = ProgressEvent(
            time=now, activity=activity, done=done, total=total, unit=unit, metrics=dict(metrics or {})
        )
        with self._path.open("a", encoding="utf-8") as file:
            file.write(event.model_dump_json() + "\n")
        self._last_time = now
        self._last_activity = activity
