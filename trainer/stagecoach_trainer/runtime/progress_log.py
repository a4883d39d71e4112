"""Lines of progress for an attempt's log, which people read with `stagecoach logs` or `kubectl logs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stagecoach_api.progress import STEPS, Pace, ProgressEvent

SECONDS_BETWEEN_LINES = 10.0
NUM_MILESTONES = 10
"""Parts of an activity's total whose end gets a line, however fast it is."""
QUIET = frozenset({"fetch", "prepare", "resume", "measure", "publish"})
"""Activities whose results have lines of their own."""
LABELS = {"tokensPerSecond": "tokens/s", "learningRate": "rate", "gradNorm": "gradient norm"}


@dataclass
class ProgressLog:
    """Chooses which progress events become lines: the first, each tenth of a known total, the last, and one every ten
    seconds of the same activity."""

    _printed: ProgressEvent | None = None
    """Event of the newest line."""
    _newest: ProgressEvent | None = None
    _pace: Pace = field(default_factory=Pace)

    def lines(self, event: ProgressEvent) -> list[str]:
        """Return the lines to print for an event, mostly none."""
        self._pace.add(event)
        before, self._newest = self._newest, event
        if before is None or before.activity != event.activity:
            last = [] if before is None or before is self._printed else self._line(before)
            return last + self._line(event)
        return self._line(event) if self._is_due(event) else []

    def _is_due(self, event: ProgressEvent) -> bool:
        printed = self._printed
        if printed is None or printed.activity != event.activity:
            return event.activity not in QUIET
        if event.time - printed.time >= SECONDS_BETWEEN_LINES:
            return True
        if not event.total or event.done <= printed.done:
            return False
        part = event.total / NUM_MILESTONES
        return event.done // part > printed.done // part

    def _line(self, event: ProgressEvent) -> list[str]:
        if event.activity in QUIET:
            return []
        self._printed = event
        end = self._pace.end()
        parts = [_amount(event), *(_metric(name, value) for name, value in event.metrics.items())]
        parts += [] if end is None or end <= event.time else [f"about {end - event.time:,.0f} s left"]
        return [f"{event.activity}: {', '.join(part for part in parts if part)}".removesuffix(": ")]


def _amount(event: ProgressEvent) -> str:
    if event.unit == STEPS and event.total:
        return f"step {event.done:,.0f} of {event.total:,.0f}"
    if event.total:
        return f"{event.done:,.0f} of {event.total:,.0f} {event.unit}".rstrip()
    return f"{event.done:,.0f} {event.unit}".rstrip() if event.done else ""


def _metric(name: str, value: float) -> str:
    return f"{LABELS.get(name, name)} {figure(value)}"


def figure(value: float) -> str:
    """Return a number with four significant digits, and large ones as whole numbers."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def figures_text(figures: Mapping[str, float]) -> str:
    """Return named figures on one line."""
    return ", ".join(_metric(name, value) for name, value in figures.items())
