"""Fits weights of statements to ranked answers: a linear support vector machine on pairs.

n pairs, k statements. It minimises  λ/2 |w|² + 1/n Σ max(0, m_i - w·d_i)  where d_i is the better answer's statements
minus the worse one's, and the margin m_i is 1 minus the contribution of statements with fixed weights. The objective is
strictly convex, so the minimum is unique. It is found by coordinate ascent on the dual (Hsieh et al., ICML 2008) in a
fixed order, until the duality gap is below `GAP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

L2 = 0.01
"""λ: small, so that only statements that do not separate any pairs get a weight near 0."""

GAP = 1e-9
"""Duality gap at which the fit stops."""

MAX_PASSES = 20000


@dataclass(frozen=True)
class Fitted:
    """Weights, and the share of pairs that they order correctly."""

    weights: Matrix
    """[k]"""

    ordered: float
    """Share of the pairs whose better answer gets the higher sum; ties count ½."""


def fit_weights(differences: Matrix, fixed: Sequence[float | None]) -> Fitted:
    """Return the weights that minimise the objective above.

    Args:
        differences: Statements of the better minus those of the worse answer [n, k].
        fixed: Given weights [k]; None for weights to fit.
    """
    known = np.array([0.0 if weight is None else weight for weight in fixed])
    free = np.array([weight is None for weight in fixed])
    # Statements are 0 or 1, so most differences repeat: solve for the distinct ones, weighted by their counts.
    pairs, counts = np.unique(differences, axis=0, return_counts=True)
    margins = 1.0 - pairs @ known
    weights = known.copy()
    weights[free] = _solve(pairs[:, free], margins, counts.astype(np.float64))
    scores = differences @ weights
    return Fitted(weights, float(np.mean((scores > 0) + 0.5 * (scores == 0))))


def objective(weights: Matrix, pairs: Matrix, margins: Matrix, counts: Matrix) -> float:
    """Return the objective; `counts`: how often each pair occurs in the data."""
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
            # Exact maximum of the dual in one coordinate, clipped to its box [0, count].
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
    """Return the duality gap, an upper bound on the distance from the minimum. Pairs with equal statements add the same
    to both sides, so they are left out of the dual."""
    losses = np.maximum(0.0, margins - pairs @ weights)
    primal = L2 / 2 * weights @ weights + counts @ losses / total
    return float(primal - (margins @ dual[useful] / total - L2 / 2 * weights @ weights))
