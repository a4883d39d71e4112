"""How an update's experiences are split into mini-batches (optimiser steps) and micro-batches (forward passes)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def own_mini_batches(order: np.ndarray, positions: Sequence[int], parts: int) -> list[np.ndarray]:
    """Return this rank's share of each mini-batch, as indices into its experiences.

    `order`: a permutation of all positions of the update, the same on every rank; `positions`: position of each of this
    rank's experiences in the update. The content of a mini-batch over all ranks thus does not depend on their number.
    """
    index = np.full(len(order), -1, np.int64)  # -1: on another rank
    index[np.asarray(positions, np.int64)] = np.arange(len(positions))
    return [own[own >= 0] for own in (index[part] for part in np.array_split(order, parts))]


def micro_batches(indices: np.ndarray, lengths: np.ndarray, micro_rows: int) -> list[np.ndarray]:
    """Return experiences in micro-batches of similar length, the longest first. `lengths`: of all experiences."""
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    return [ordered[start : start + micro_rows] for start in range(0, len(ordered), micro_rows)]
