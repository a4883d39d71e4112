"""What the attempts report of themselves, kept in memory: nothing of it goes to etcd for every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Key = tuple[str, str, int]
"""UID of the run, stage, number of the attempt."""


@dataclass(frozen=True)
class Report:
    """The newest word of an attempt."""

    pod_uid: str
    time: float
    """When it came in, by the operator's clock, in seconds since the epoch."""
    activity: str = ""
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    percentage: int | None = None
    """None: the attempt did not say."""
    remaining_seconds: int | None = None
    """None: the attempt did not say."""
    metrics: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Heard:
    """The newest report of an attempt, and the longest silence between two of them."""

    report: Report
    longest_silence: float = 0.0


@dataclass
class Board:
    """The newest report of every living attempt."""

    _heard: dict[Key, Heard] = field(default_factory=dict)

    def post(self, key: Key, report: Report) -> None:
        before = self._heard.get(key)
        if before is None or before.report.pod_uid != report.pod_uid:
            self._heard[key] = Heard(report)
            return
        silence = report.time - before.report.time
        self._heard[key] = Heard(report, max(before.longest_silence, silence))

    def of(self, key: Key) -> Heard | None:
        return self._heard.get(key)

    def forget(self, run_uid: str, living: frozenset[tuple[str, int]] = frozenset()) -> None:
        """Drop the reports of a run's attempts that do not live any more."""
        for key in [key for key in self._heard if key[0] == run_uid and key[1:] not in living]:
            del self._heard[key]
