"""Upload of the logs of a node's ranks while they grow, so that a pod lost with its node leaves nearly all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from stagecoach_api.artifacts import ResolvedStage, attempt_logs_prefix
from stagecoach_api.store import Store, StoreError
from stagecoach_trainer.launcher.stack_dumps import FLIGHT_RECORDER
from stagecoach_trainer.runtime.run_store import open_run_store

if TYPE_CHECKING:
    from pathlib import Path

FIRST_SECONDS = 20.0
"""Delay of the first upload. Pods are lost in the first minute too, but importing boto3 must not slow the workers'
start."""
EVERY_SECONDS = 60.0
MAX_REASON = 300
"""Characters shown of an unexpected error."""


class GrowingLog(Protocol):
    """A log that can be read while it grows."""

    @property
    def path(self) -> Path:
        """Its file; the object in the store has the same name."""

    @property
    def taken(self) -> int:
        """Bytes ever written to it, by which growth is detected."""

    def content(self) -> tuple[int, bytes]:
        """Return `taken` and the bytes that are kept, read at the same moment."""


@dataclass(frozen=True)
class Dump:
    """A file that a library has written."""

    path: Path

    @property
    def taken(self) -> int:
        return self.path.stat().st_size

    def content(self) -> tuple[int, bytes]:
        data = self.path.read_bytes()
        return len(data), data


class LogUploads:
    """A thread that stores logs. A failure is reported once and does not affect the stage."""

    def __init__(
        self,
        stage: bytes,
        logs: Sequence[GrowingLog],
        say: Callable[[str], None],
        first_seconds: float = FIRST_SECONDS,
        every_seconds: float = EVERY_SECONDS,
        folder: Path | None = None,
    ) -> None:
        """`stage`: the content of the stage file. `say`: prints a line for people. `folder`: where libraries leave
        dumps, which are stored, too."""
        self._stage = stage
        self._logs = logs
        self._say = say
        self._folder = folder
        self._waits = (first_seconds, every_seconds)
        self._stored: dict[str, int] = {}
        self._target: tuple[Store, str] | None = None
        self._last_complaint = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="log uploads", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Store what was added since the last upload; give up after `seconds`."""
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
            for log in [*self._logs, *self._dumps()]:
                if self._stored.get(log.path.name) != log.taken:
                    taken, content = log.content()
                    store, prefix = self._opened()
                    store.write(f"{prefix}/{log.path.name}", content)
                    self._stored[log.path.name] = taken
        except (StoreError, OSError) as error:
            self._complain(str(error))
        except Exception as error:  # a failed upload must not stop the stage
            self._complain(f"{type(error).__name__}: {error}"[:MAX_REASON])

    def _dumps(self) -> list[Dump]:
        """Return the dumps of libraries that are there by now."""
        if self._folder is None:
            return []
        return [Dump(path) for path in sorted(self._folder.glob(f"{FLIGHT_RECORDER}*")) if path.is_file()]

    def _opened(self) -> tuple[Store, str]:
        if self._target is None:
            stage = ResolvedStage.model_validate_json(self._stage)
            self._target = open_run_store(stage), attempt_logs_prefix(stage.digest, stage.attempt_id)
        return self._target

    def _complain(self, reason: str) -> None:
        if reason != self._last_complaint:
            self._last_complaint = reason
            self._say(f"the logs of this node could not be stored: {reason}")
