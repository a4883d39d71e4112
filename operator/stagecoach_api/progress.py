"""Progress of an attempt: a line of its progress file, and the body of a report to the operator."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from stagecoach_api.base import Model


class ProgressEvent(Model):
    """Current activity and progress of a stage. Written at least every few seconds, so it is also a heartbeat."""

    time: float
    """Seconds since the epoch."""

    activity: str = Field(max_length=64)
    """Current activity: `fetch`, `read`, `tokenise`, `train`, `measure`, `generate`, `publish` …"""

    done: float = 0.0
    """Amount of work done, in `unit`."""

    total: float | None = None
    """Total amount of work, in `unit`. None if unknown."""

    unit: str = Field(default="", max_length=32)
    """Unit of `done` and `total`, such as `tokens` or `records`."""

    metrics: dict[str, float] = Field(default_factory=dict)
    """Further figures to display, such as `loss` and `tokensPerSecond`."""

    warning: str = ""
    """A warning that has just arisen. Empty for other events."""


STEPS = "steps"
"""Unit of training steps. Other activities of a training loop, such as measuring, report the step they follow too."""
TRAIN = "train"
RESUME = "resume"
"""Activities: making steps, and going back to the step of a checkpoint."""
PACE_SECONDS = 60.0
PACE_POINTS = 5
MAX_PACE_POINTS = 256


@dataclass
class Pace:
    """The time that an activity still needs, from its pace in about the last minute.

    Training steps keep their pace while others of their loop's activities come in between, whose time counts.
    """

    _key: str = ""
    _points: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MAX_PACE_POINTS))
    """Time and amount done, the oldest first."""
    _total: float | None = None

    def add(self, event: ProgressEvent) -> None:
        """Take the next event."""
        key = STEPS if event.unit == STEPS else event.activity
        if key != self._key or event.total != self._total:
            self._key, self._total = key, event.total
            self._points.clear()
        if key == STEPS and event.activity != TRAIN:
            return
        if self._points and event.done < self._points[-1][1]:  # rolled back
            self._points.clear()
        if not self._points or event.done > self._points[-1][1]:
            self._points.append((event.time, event.done))
        while len(self._points) > PACE_POINTS and event.time - self._points[0][0] > PACE_SECONDS:
            self._points.popleft()

    def end(self) -> float | None:
        """Return when the activity will have ended, in seconds since the epoch; None if that is not known yet."""
        if self._total is None or len(self._points) < 2:
            return None
        (began, first), (now, done) = self._points[0], self._points[-1]
        if now <= began:
            return None
        return now + max(0.0, self._total - done) * (now - began) / (done - first)


# Fields of an event that Kubeflow Trainer's protocol (KEP-2779) does not have are sent as metrics with these names.
METRIC_ACTIVITY = "activity"
METRIC_DONE = "done"
METRIC_TOTAL = "total"
METRIC_UNIT = "unit"


def trainer_status(event: ProgressEvent, remaining_seconds: float | None) -> dict[str, Any]:
    """Return the body of the request with which a stage reports an event. `remaining_seconds`: None if unknown."""
    own = {METRIC_ACTIVITY: event.activity, METRIC_DONE: event.done, METRIC_TOTAL: event.total, METRIC_UNIT: event.unit}
    metrics = {**event.metrics, **{name: value for name, value in own.items() if value not in (None, "")}}
    status: dict[str, Any] = {
        "lastUpdatedTime": datetime.fromtimestamp(event.time, UTC).isoformat(),
        "metrics": [{"name": name, "value": str(value)} for name, value in metrics.items()],
    }
    if event.total:
        status["progressPercentage"] = max(0, min(100, int(100 * event.done / event.total)))
    if remaining_seconds is not None:
        status["estimatedRemainingSeconds"] = max(0, int(remaining_seconds))
    return {"trainerStatus": status}
