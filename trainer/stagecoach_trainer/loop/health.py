"""Signs in a training history that the result is of little use, although every number is finite."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXPLOSION = 100.0
"""Ratio of a gradient norm to those before it that no healthy run shows. Loss spikes of large runs that were survived
had ratios of about 10 (arXiv 2204.02311, section 5.1; arXiv 2312.16903)."""
FEWEST_POINTS = 20
"""Shorter histories show no trend."""
STANDARD_ERRORS = 3.0

History = Sequence[Mapping[str, float]]


def concerns(history: History) -> list[str]:
    """Return a sentence for each sign that training went wrong.

    Clipped gradients are no sign: AdamW divides by their size anyway, so that scaling all of them changes little.
    """
    found = (exploding(history), rising(history), falling(history))
    return [text for text in found if text is not None]


def exploding(history: History) -> str | None:
    """Return a sentence if a gradient norm is far above the median of those before it; it names the first such step.

    A longer history gives the same sentence, so that a resumed run repeats it.
    """
    # A norm of 0 is that of a step without training, as while a critic warms up.
    points = [(point["step"], point["gradNorm"]) for point in history if point.get("gradNorm")]
    if not points or max(norm for _, norm in points) <= EXPLOSION * points[0][1]:
        return None
    norms: list[float] = []
    for step, norm in points:
        # The first norm too: where training converges, the median falls towards 0.
        usual = max(statistics.median(norms), norms[0]) if norms else 0.0
        if usual > 0 and norm > EXPLOSION * usual:
            return (
                f"the gradient norm rose to {norm:.3g} at step {step:.0f}, {norm / usual:,.0f} times the "
                "usual one before; lower `optimizer.learningRate`, or raise `schedule.warmupSteps`"
            )
        norms.append(norm)
    return None


def rising(history: History) -> str | None:
    """Return a sentence if the loss of the last tenth is clearly above that of the first tenth, noise considered."""
    found = _trend([point["loss"] for point in history if "loss" in point])
    if found is None or not found.is_clear or found.change <= 0:
        return None
    return (
        f"the loss rose from {found.first:.4g} in the first tenth of the steps to "
        f"{found.last:.4g} in the last; lower `optimizer.learningRate`, unless later data is harder"
    )


def falling(history: History) -> str | None:
    """Return a sentence if the mean reward of the last tenth of updates is clearly below that of the first tenth."""
    found = _trend([point["reward"] for point in history if "reward" in point])
    if found is None or not found.is_clear or found.change >= 0:
        return None
    return (
        f"the mean reward fell from {found.first:.4g} in the first tenth of the updates to {found.last:.4g} in the "
        "last; lower `optimizer.learningRate` or `kl.coefficient`, unless later prompts are harder"
    )


@dataclass(frozen=True)
class _Trend:
    """Means of the first and the last tenth of a series."""

    first: float
    last: float
    error: float
    """Standard error of their difference."""

    @property
    def change(self) -> float:
        return self.last - self.first

    @property
    def is_clear(self) -> bool:
        return abs(self.change) > STANDARD_ERRORS * self.error


def _trend(values: Sequence[float]) -> _Trend | None:
    """Return how a series changed from its first to its last tenth; None if it is too short."""
    size = max(len(values) // 10, 5)
    if len(values) < FEWEST_POINTS:
        return None
    first, last = values[:size], values[-size:]
    error = ((statistics.variance(first) + statistics.variance(last)) / size) ** 0.5
    return _Trend(statistics.fmean(first), statistics.fmean(last), error)


def not_finite(figures: Mapping[str, float]) -> list[str]:
    """Return a phrase for each figure that is NaN or infinite."""
    return [f"`{name}` is {value}" for name, value in figures.items() if not math.isfinite(value)]
