"""Progress reports of the attempts, kept in memory: a write to etcd per training step would be far too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ReportKey = tuple[str, str, int]
"""UID of the run, name of the stage, number of the attempt."""


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


@dataclass
class ProgressReports:
    """The newest report of every live attempt."""

    _latest: dict[ReportKey, LatestReport] = field(default_factory=dict)

    def record(self, key: ReportKey, report: ProgressReport) -> None:
        before = self._latest.get(key)
        # Silence is measured within one pod: a pod that Kueue re-created may have waited in a queue for hours.
        if before is None or before.report.pod_uid != report.pod_uid:
            self._latest[key] = LatestReport(report)
            return
        silence = report.time - before.report.time
        self._latest[key] = LatestReport(report, max(before.longest_silence, silence))

    def latest(self, key: ReportKey) -> LatestReport | None:
        return self._latest.get(key)

    def forget(self, run_uid: str, living: frozenset[tuple[str, int]] = frozenset()) -> None:
        """Drop the reports of a run's attempts except those of the live ones."""
        for key in [key for key in self._latest if key[0] == run_uid and key[1:] not in living]:
            del self._latest[key]
