"""Logs of ended attempts: each rank's, as the trainer has kept them with the attempt in the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stagecoach_api.artifacts import RankLog, attempt_logs_prefix, parse_rank_log_name, rank_mark
from stagecoach_api.store import Store


@dataclass(frozen=True)
class StoredLog:
    """What one rank printed from one start of its node to its end."""

    key: str
    told: RankLog


def stored_logs(store: Store, digest: str, attempt: int, rank: int | None = None) -> list[StoredLog]:
    """Return the logs of an attempt by rank, each rank's in the order of their start. `rank`: None, all ranks."""
    found = []
    for entry in store.list(attempt_logs_prefix(digest, attempt)):
        told = parse_rank_log_name(entry.key.rpartition("/")[2])
        if told is not None and rank in (None, told.rank):
            found.append(StoredLog(entry.key, told))
    return sorted(found, key=lambda item: item.told)


def copy_stored(store: Store, logs: list[StoredLog], write: Callable[[str], None], tell: Callable[[str], None]) -> None:
    """Write logs one after the other, each line with its rank where there are several. `tell`: says what is no log."""
    several = len({item.told.rank for item in logs}) > 1
    for item in logs:
        tell(f"{store.uri.rstrip('/')}/{item.key}")
        mark = rank_mark(item.told.rank) if several else ""
        text = store.read(item.key).decode("utf-8", errors="replace")
        for line in text.removesuffix("\n").split("\n") if text else ():
            write(f"{mark}{line}")
