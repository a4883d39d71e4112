"""Progress of an attempt: a line of its progress file, and the body of a report to the operator."""

from __future__ import annotations

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
