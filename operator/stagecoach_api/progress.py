"""One line of an attempt's progress file."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from stagecoach_api.base import Model


class ProgressEvent(Model):
    """A heartbeat: what the stage is doing now and how far it is. Written at least every few seconds."""

    time: float
    """Seconds since the epoch."""

    activity: str = Field(max_length=64)
    """What is being done: `fetch`, `read`, `tokenise`, `train`, `measure`, `generate`, `publish` …"""

    done: float = 0.0
    """How much of it is done, in `unit`."""

    total: float | None = None
    """How much there is. None: unknown."""

    unit: str = Field(default="", max_length=32)
    """Unit of `done` and `total`, such as `tokens` or `records`."""

    metrics: dict[str, float] = Field(default_factory=dict)
    """Figures to show beside, such as `loss` and `tokensPerSecond`."""


# What an event says beyond Kubeflow Trainer's protocol (KEP-2779) travels among its metrics, under these names.
METRIC_ACTIVITY = "activity"
METRIC_DONE = "done"
METRIC_TOTAL = "total"
METRIC_UNIT = "unit"


def trainer_status(event: ProgressEvent, remaining_seconds: float | None) -> dict[str, Any]:
    """Return the body with which a stage reports an event. `remaining_seconds`: None, unknown."""
    own = {METRIC_ACTIVITY: event.activity, METRIC_DONE: event.done, METRIC_TOTAL: event.total, METRIC_UNIT: event.unit}
    told = {**event.metrics, **{name: value for name, value in own.items() if value not in (None, "")}}
    status: dict[str, Any] = {
        "lastUpdatedTime": datetime.fromtimestamp(event.time, UTC).isoformat(),
        "metrics": [{"name": name, "value": str(value)} for name, value in told.items()],
    }
    if event.total:
        status["progressPercentage"] = max(0, min(100, int(100 * event.done / event.total)))
    if remaining_seconds is not None:
        status["estimatedRemainingSeconds"] = max(0, int(remaining_seconds))
    return {"trainerStatus": status}
