"""The logs of a node's ranks are stored while they grow, so that a pod that is lost with its node leaves nearly all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from stagecoach_api.artifacts import ResolvedStage, attempt_logs_prefix
from stagecoach_api.store import Store, StoreError
from stagecoach_trainer.runtime.run_store import open_run_store

if TYPE_CHECKING:
    from pathlib import Path

FIRST_SECONDS = 20.0
"""After the start: the first minute loses pods too, but importing boto3 must not slow the workers' own start."""
EVERY_SECONDS = 60.0
MAX_REASON = 300
"""Characters shown of an error that nobody foresaw."""


class GrowingLog(Protocol):
    """A log that can be read while it grows."""

    @property
    def path(self) -> Path:
        """Its file; the object has the same name."""

    @property
    def taken(self) -> int:
        """Bytes ever written to it: what tells that it has grown."""

    def content(self) -> tuple[int, bytes]:
        """Return `taken` and what is kept of it, both as they are at one moment."""


class LogUploads:
    """A thread that stores logs; whatever goes wrong there is told once and hurts nobody."""

    def __init__(
        self,
        stage: bytes,
        logs: Sequence[GrowingLog],
        say: Callable[[str], None],
        first_seconds: float = FIRST_SECONDS,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        """`stage`: what the stage file holds. `say`: tells people a line."""
        self._stage = stage
        self._logs = logs
        self._say = say
        self._waits = (first_seconds, every_seconds)
        self._stored: dict[str, int] = {}
        self._place: tuple[Store, str] | None = None
        self._said = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="log uploads", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Store what has come since the last time; give up after `seconds`."""
        self._ending.set()
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._say(f"the end of this node's logs could not be stored within {max(seconds, 0.0):.0f} s")

    def _work(self) -> None:
        wait, every = self._waits
        while not self._ending.wait(wait):
            self._store_grown()
            wait = every
        self._store_grown()

    def _store_grown(self) -> None:
        try:
            for log in self._logs:
                if self._stored.get(log.path.name) != log.taken:
                    taken, content = log.content()
                    store, prefix = self._opened()
                    store.write(f"{prefix}/{log.path.name}", content)
                    self._stored[log.path.name] = taken
        except (StoreError, OSError) as error:
            self._complain(str(error))
        except Exception as error:  # the stage must not know
            self._complain(f"{type(error).__name__}: {error}"[:MAX_REASON])

    def _opened(self) -> tuple[Store, str]:
        if self._place is None:
            stage = ResolvedStage.model_validate_json(self._stage)
            self._place = open_run_store(stage), attempt_logs_prefix(stage.digest, stage.attempt)
        return self._place

    def _complain(self, reason: str) -> None:
        if reason != self._said:
            self._said = reason
            self._say(f"the logs of this node could not be stored: {reason}")
