"""Weights of statements from ranked answers: a linear machine with the hinge loss on pairs.

n pairs, k statements. Minimised is  λ/2 |w|² + 1/n Σ max(0, m_i - w·d_i)  with d_i = better less worse answer and the
margin m_i = 1 less what the statements of fixed weight give already. It is strictly convex, so the result is one; it is
found by coordinate ascent on the dual (Hsieh et al., ICML 2008), in a fixed order, until the duality gap is below
`GAP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

L2 = 0.01
"""λ: small, so that only statements which decide nothing lose their weight."""

GAP = 1e-9
MAX_PASSES = 20000


@dataclass(frozen=True)
class Fitted:
    """Weights, and how well they order the pairs."""

    weights: Matrix
    """[k]"""

    ordered: float
    """Share of the pairs whose better answer gets the higher sum; a tie is half."""


def fit_weights(differences: Matrix, fixed: Sequence[float | None]) -> Fitted:
    """Return the weights that order the pairs best.

    Args:
        differences: Better less worse answer, statement by statement: [n, k].
        fixed: Weights that are given; None: to be found.
    """
    known = np.array([0.0 if weight is None else weight for weight in fixed])
    free = np.array([weight is None for weight in fixed])
    pairs, counts = np.unique(differences, axis=0, return_counts=True)
    margins = 1.0 - pairs @ known
    weights = known.copy()
    weights[free] = _solve(pairs[:, free], margins, counts.astype(np.float64))
    scores = differences @ weights
    return Fitted(weights, float(np.mean((scores > 0) + 0.5 * (scores == 0))))


def objective(weights: Matrix, pairs: Matrix, margins: Matrix, counts: Matrix) -> float:
    """Return what is minimised; `counts` says how often each pair stands in the data."""
    losses = np.maximum(0.0, margins - pairs @ weights)
    return float(L2 / 2 * weights @ weights + counts @ losses / counts.sum())


def _solve(pairs: Matrix, margins: Matrix, counts: Matrix) -> Matrix:
    scale = 1.0 / (L2 * counts.sum())
    squares = (pairs * pairs).sum(axis=1)
    useful = [int(index) for index in np.flatnonzero(squares > 0)]
    dual = np.zeros(len(pairs))
    weights = np.zeros(pairs.shape[1])
    for _ in range(MAX_PASSES):
        for index in useful:
            step = (margins[index] - pairs[index] @ weights) / (squares[index] * scale)
            value = min(max(dual[index] + step, 0.0), counts[index])
            weights += (value - dual[index]) * scale * pairs[index]
            dual[index] = value
        if _gap(weights, dual, pairs[useful], margins[useful], counts[useful], counts.sum(), useful) <= GAP:
            break
    return weights


def _gap(
    weights: Matrix, dual: Matrix, pairs: Matrix, margins: Matrix, counts: Matrix, total: float, useful: list[int]
) -> float:
    """Return how far, at most, the weights are from the least loss; pairs without a difference change nothing."""
    losses = np.maximum(0.0, margins - pairs @ weights)
    primal = L2 / 2 * weights @ weights + counts @ losses / total
    return float(primal - (margins @ dual[useful] / total - L2 / 2 * weights @ weights))
