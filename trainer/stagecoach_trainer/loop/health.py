"""Signs in a training history that the result is of little use, although every number is finite."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

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
    found = (exploding(history), rising(history))
    return [text for text in found if text is not None]


def exploding(history: History) -> str | None:
    """Return a sentence if a gradient norm is far above the median of those before it; it names the first such step.

    A longer history gives the same sentence, so that a resumed run repeats it.
    """
    points = [(point["step"], point["gradNorm"]) for point in history if "gradNorm" in point]
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
    losses = [point["loss"] for point in history if "loss" in point]
    size = max(len(losses) // 10, 5)
    if len(losses) < FEWEST_POINTS:
        return None
    first, last = losses[:size], losses[-size:]
    error = ((statistics.variance(first) + statistics.variance(last)) / size) ** 0.5
    rise = statistics.fmean(last) - statistics.fmean(first)
    if rise <= STANDARD_ERRORS * error or rise <= 0:
        return None
    return (
        f"the loss rose from {statistics.fmean(first):.4g} in the first tenth of the steps to "
        f"{statistics.fmean(last):.4g} in the last; lower `optimizer.learningRate`, unless later data is harder"
    )
