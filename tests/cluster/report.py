"""Progress lines of `make cluster`, and its error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG_LINES_SHOWN = 20
LOG_COLUMNS_SHOWN = 400


class ClusterError(Exception):
    """The cluster cannot be started or removed; the message states what happened and what to do."""


@contextmanager
def timed(part: str, done: str) -> Iterator[None]:
    """Print a line when the block succeeds: the part, what was done, and the seconds it took."""
    started = time.monotonic()
    yield
    print_line(part, done, time.monotonic() - started)


def print_line(part: str, done: str, seconds: float = 0.0) -> None:
    """Print the progress line of a part."""
    print(f"  {part:<38} {done:<12} {seconds:7.1f} s", flush=True)


def last_lines(log: Path) -> str:
    """Return the end of a log file, for an error message."""
    if not log.exists():
        return f"{log} was never written"
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([f"the end of {log}:", *(line[-LOG_COLUMNS_SHOWN:] for line in lines[-LOG_LINES_SHOWN:])])
