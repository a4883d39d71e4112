"""Reading growing files: progress events, and the last lines of a log."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from stagecoach_api.progress import ProgressEvent

LAST_BYTES = 16 * 1024
MOST_EVENTS = 512
"""Events of a long file that are read at once, the newest ones; at two a second, the last minutes."""


class ProgressTail:
    """Follows one attempt's progress file; each call reads only what was added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def added(self) -> list[ProgressEvent]:
        """Return the complete events since the last call, at most 512, the newest. Other lines are skipped."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [event for line in whole.splitlines()[-MOST_EVENTS:] if (event := _event(line)) is not None]


def _event(line: bytes) -> ProgressEvent | None:
    try:
        return ProgressEvent.model_validate_json(line)
    except ValidationError:
        return None


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last `count` non-empty lines of a text file without line ends; empty if the file does not exist."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LAST_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    # A progress bar overwrites its line with \r; keep only its last state.
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:]
