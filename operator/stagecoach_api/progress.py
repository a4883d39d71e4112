"""One line of an attempt's progress file."""

from __future__ import annotations

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
