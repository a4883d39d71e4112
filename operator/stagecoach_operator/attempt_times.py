"""When an attempt has run and waited, by the operator's own clock. Pure.

Deadlines compare times with now, so all of them are this operator's: a node's or the API server's clock may differ by
an hour. A queue may stop an attempt's pods and create new ones later; only the time in which all of them run counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from stagecoach_api.status import AttemptStatus, WaitStatus
from stagecoach_core.values import Wait
from stagecoach_operator.pod_startup import KINDS, Waiting

MAX_WAITS = 8
MAX_SECONDS = 1e10
"""The longest time that a status can hold."""


def moment(seconds: float) -> datetime:
    """Return seconds since the epoch as a time, to the millisecond."""
    return datetime.fromtimestamp(round(seconds, 3), UTC)


def with_times(record: AttemptStatus, waiting: Waiting | None, now: float) -> AttemptStatus:
    """Return the record of a live attempt with the time at which it began to run or to wait.

    `waiting`: why not all of its pods run, None if they do.
    """
    if waiting is None:
        if record.running_since is not None and not record.waits:
            return record
        return record.model_copy(update={"running_since": record.running_since or moment(now), "waits": ()})
    waits = record.waits
    if not any(wait.reason == waiting.reason for wait in waits):
        waits = (*waits, WaitStatus(reason=waiting.reason, since=moment(now)))[-MAX_WAITS:]
    if record.running_since is None and waits is record.waits:
        return record
    ran = min(MAX_SECONDS, round(running_seconds(record, now), 3))
    return record.model_copy(update={"running_since": None, "ran_seconds": ran, "waits": waits})


def running_seconds(record: AttemptStatus, now: float) -> float:
    """Return how long an attempt has run until it ended, or until now, in seconds."""
    if record.running_since is None:
        return record.ran_seconds
    end = now if record.ended is None else record.ended.timestamp()
    return record.ran_seconds + max(0.0, end - record.running_since.timestamp())


def wait_of(record: AttemptStatus, waiting: Waiting, now: float) -> Wait:
    """Return what an attempt waits for in the core's terms, since the first reason of that kind."""
    kind = KINDS[waiting.reason]
    # A kubelet alternates between two reasons while it tries again; the wait is the same.
    alike = [wait.since.timestamp() for wait in record.waits if _is_of_kind(wait.reason, kind)]
    return Wait(kind, min(alike, default=now), waiting.reason, waiting.message)


def _is_of_kind(reason: str, kind: object) -> bool:
    return any(known == reason and KINDS[known] is kind for known in KINDS)


def waiting_since(record: AttemptStatus, default: float) -> float:
    """Return since when an attempt has not been running, in seconds since the epoch."""
    return min((wait.since.timestamp() for wait in record.waits), default=default)


def without_future(
    records: Mapping[tuple[str, int], AttemptStatus], now: float
) -> dict[tuple[str, int], AttemptStatus]:
    """Return the records that another operator has left, without times in the future: its clock was ahead of ours."""
    return {key: _not_after(record, moment(now)) for key, record in records.items()}


def _not_after(record: AttemptStatus, now: datetime) -> AttemptStatus:
    times = {
        name: now
        for name in ("started", "running_since", "ended")
        if (time := getattr(record, name)) is not None and time > now
    }
    if any(wait.since > now for wait in record.waits):
        waits = tuple(wait.model_copy(update={"since": min(wait.since, now)}) for wait in record.waits)
        return record.model_copy(update={**times, "waits": waits})
    return record.model_copy(update=times) if times else record
