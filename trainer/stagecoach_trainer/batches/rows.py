"""Rows of tokens, the units of training data, and the plan of each step's. Imports numpy, not torch.

T tokens of a row, at most the step's sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
"""Token ids."""

IGNORE = -100
"""Label of a position without loss."""


@dataclass(frozen=True)
class Row:
    """One row of a batch: one sample, or several packed one after the other."""

    tokens: Ids
    """[T]."""

    labels: npt.NDArray[np.int32]
    """Targets [T]: `labels[t]` is predicted at position t (already shifted), or IGNORE. The last position of every
    sample is IGNORE."""

    lengths: tuple[int, ...]
    """Tokens of each sample packed in the row; their sum is T."""

    def samples(self) -> list[Row]:
        """Return each sample as a row of its own."""
        ends = np.cumsum(self.lengths)
        parts = (slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True))
        return [Row(self.tokens[part], self.labels[part], (part.stop - part.start,)) for part in parts]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Positions with loss."""
        return int(np.count_nonzero(self.labels != IGNORE))


class Unit(Protocol):
    """An element of a step's global batch: a row, or the answers to one prompt. A unit is never divided."""

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the model, without padding."""

    @property
    def num_targets(self) -> int:
        """The unit's part of the divisor of the summed loss."""


class StepPlan(Protocol):
    """The data of each optimiser step: a pure function of seed and step, so that any step is computed directly."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole stage."""

    def rows(self, step: int) -> Sequence[Unit]:
        """Return the global batch of step `step` (from 0), over all ranks."""
