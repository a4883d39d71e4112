"""Logs of ended attempts: the trainer stores each rank's log with its attempt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stagecoach_api.artifacts import RankLog, attempt_logs_prefix, parse_rank_log_name, rank_mark
from stagecoach_api.store import Store


@dataclass(frozen=True)
class StoredLog:
    """The output of one rank, from one start of its node to its end."""

    key: str
    name: RankLog
    """Rank and start time."""


def stored_logs(store: Store, digest: str, attempt: str, rank: int | None = None) -> list[StoredLog]:
    """Return the logs of an attempt, sorted by rank and start. `attempt`: `attempt_id`. `rank`: None for all ranks."""
    found = []
    for entry in store.list(attempt_logs_prefix(digest, attempt)):
        name = parse_rank_log_name(entry.key.rpartition("/")[2])
        if name is not None and rank in (None, name.rank):
            found.append(StoredLog(entry.key, name))
    return sorted(found, key=lambda item: item.name)


def print_stored_logs(
    store: Store, logs: list[StoredLog], write: Callable[[str], None], notify: Callable[[str], None]
) -> None:
    """Write logs one after the other, each line with its rank if there are several.

    `notify`: shows messages that are not part of a log.
    """
    several = len({item.name.rank for item in logs}) > 1
    for item in logs:
        notify(f"{store.uri.rstrip('/')}/{item.key}")
        mark = rank_mark(item.name.rank) if several else ""
        text = store.read(item.key).decode("utf-8", errors="replace")
        for line in text.removesuffix("\n").split("\n") if text else ():
            write(f"{mark}{line}")
