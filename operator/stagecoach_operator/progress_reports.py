"""Progress reports of the attempts, kept in memory: a write to etcd per training step would be far too much.

Once a minute the time of the newest report goes to the attempt's record, so that another operator process knows it.
What silence means depends on who is silent: one attempt among many hangs, but if no attempt at all is heard, the
reports are lost on their way, and nothing may be concluded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

ReportKey = tuple[str, str, int]
"""UID of the run, name of the stage, number of the attempt."""

DEAF_SECONDS = 300.0
"""Without any report for this long, it is the operator that is not reached. Shorter than the shortest silence that
counts as a hang (`stagecoach_core.policies.timeout`), so that it is known in time."""
MANY = 2
"""Attempts that do not hang all at once. A single one may: then a call to the own Service shows whether it is
reached."""


@dataclass(frozen=True)
class ProgressReport:
    """One report of an attempt."""

    pod_uid: str
    time: float
    """When it was received, by the operator's clock, in seconds since the epoch."""
    activity: str = ""
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    percentage: int | None = None
    """None if the attempt did not report it."""
    remaining_seconds: int | None = None
    """None if the attempt did not report it."""
    metrics: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LatestReport:
    """The newest report of an attempt, and the longest silence between two of its reports, in seconds."""

    report: ProgressReport
    longest_silence: float = 0.0


@dataclass(frozen=True)
class Hearing:
    """What may be concluded from silence now."""

    since: float = 0.0
    """Since when reports arrive, in seconds since the epoch. Silence before does not count."""
    deaf: str = ""
    """Why silence means nothing. Empty if it counts."""
    expected: bool = False
    """Whether attempts have an address to report to, so that one that never did may hang."""


@dataclass
class ProgressReports:
    """The newest report of every live attempt, and whether reports arrive at all."""

    since: float = 0.0
    """When this process began to receive reports, or received them again; in seconds since the epoch."""
    checked: bool = False
    """Whether calls to the own Service are made."""
    reached_at: float = 0.0
    """When the last call to the own Service arrived here; 0 if none has."""
    _latest: dict[ReportKey, LatestReport] = field(default_factory=dict)
    _expected: set[ReportKey] = field(default_factory=set)
    """Live attempts that have reported to this or an earlier process."""
    _heard_at: float = 0.0

    def start(self, now: float, checked: bool) -> None:
        """Note that this process is the active one from now on."""
        self.since, self.checked = now, checked

    def record(self, key: ReportKey, report: ProgressReport) -> None:
        if self.deaf(report.time):
            self.since = report.time
        self._heard_at = max(self._heard_at, report.time)
        self._expected.add(key)
        before = self._latest.get(key)
        # Silence is measured within one pod: a pod that Kueue re-created may have waited in a queue for hours.
        if before is None or before.report.pod_uid != report.pod_uid:
            self._latest[key] = LatestReport(report)
            return
        silence = report.time - max(before.report.time, self.since)
        self._latest[key] = LatestReport(report, max(before.longest_silence, silence))

    def latest(self, key: ReportKey) -> LatestReport | None:
        return self._latest.get(key)

    def expect(self, key: ReportKey) -> None:
        """Note that a live attempt has reported to an earlier process."""
        self._expected.add(key)

    def reached(self, now: float) -> None:
        """Note that a call to the own Service has arrived here."""
        if self.deaf(now):
            self.since = now
        self.reached_at = now

    def deaf(self, now: float) -> str:
        """Return why silence means nothing now. Empty if it counts."""
        last = max(self._heard_at, self.since)
        if now < last + DEAF_SECONDS:
            return ""
        when = datetime.fromtimestamp(int(last), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if len(self._expected) >= MANY:
            return f"no attempt has been heard since {when}, so no silence counts as a hang"
        if not self.checked or now < self.reached_at + DEAF_SECONDS:
            return ""
        return f"the operator's own Service has not been reached since {when}, so no silence counts as a hang"

    def forget(self, run_uid: str, living: frozenset[tuple[str, int]] = frozenset()) -> None:
        """Drop the reports of a run's attempts except those of the live ones."""
        for key in [key for key in self._expected if key[0] == run_uid and key[1:] not in living]:
            self._expected.discard(key)
            self._latest.pop(key, None)
