"""When an attempt was last heard, from reports and its record. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from stagecoach_api.status import AttemptStatus
from stagecoach_operator.progress_reports import Hearing, LatestReport

RECORD_SECONDS = 60.0
"""How far the report in an attempt's record may be older than the newest one."""


@dataclass(frozen=True)
class Heartbeat:
    """The silence of an attempt, in the terms of `stagecoach_core.values.Attempt`."""

    time: float | None = None
    """None if the attempt has never been heard."""
    longest_silence: float = 0.0
    listening_since: float = 0.0


def heartbeat_of(record: AttemptStatus, latest: LatestReport | None, hearing: Hearing, now: float) -> Heartbeat:
    """Return what is known of an attempt's silence.

    Without a progress server, or while no report arrives from any attempt, silence means nothing: the heartbeat is now.
    """
    longest = max(float(record.longest_silence_seconds), 0.0 if latest is None else latest.longest_silence)
    # After a preemption by Kueue, the pods may have started hours after the last report. Not by their nodes' clocks.
    started = 0.0 if record.running_since is None else record.running_since.timestamp()
    times = [] if latest is None else [latest.report.time]
    times += [] if record.last_report is None else [record.last_report.timestamp()]
    if hearing.deaf or not (times or hearing.expected):
        return Heartbeat(now, longest, hearing.since)
    return Heartbeat(max(*times, started) if times else None, longest, max(hearing.since, started))


def with_report(record: AttemptStatus, latest: LatestReport | None) -> AttemptStatus:
    """Return the record with the time of the newest report, unless it has one of the last minute."""
    if latest is None:
        return record
    before = record.last_report
    if before is not None and latest.report.time < before.timestamp() + RECORD_SECONDS:
        return record
    seconds = max(record.longest_silence_seconds, int(latest.longest_silence))
    found = {"last_report": datetime.fromtimestamp(int(latest.report.time), UTC), "longest_silence_seconds": seconds}
    return record.model_copy(update=found)
