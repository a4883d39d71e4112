"""Generalised advantage estimation, and the normalisation of advantages over a whole update.

B answers, padded to T tokens; `mask` [B, T] (bool) is true at tokens that count. Values at other positions are ignored,
even if they are NaN, and the result there is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""Added to the variance before the square root, so that equal values give 0 instead of NaN."""


@torch.no_grad()
def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns [B, T], both without gradient, by GAE (arXiv 1506.02438).

    A_t = Σ_k (gamma · lambda)^k · (r_{t+k} + gamma · V_{t+k+1} - V_{t+k}). V is 0 after an answer's last token, whether
    the answer ended or was truncated. Returns are A + V. Each contiguous stretch of the mask is one answer.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    # Backwards, by the recursion A_t = δ_t + gamma · lambda · A_{t+1}, which equals the sum above (eq. 16 of the
    # paper).
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        # Masked at every step: an advantage must not leak from one answer of a row into the one before it.
        next_advantage = (delta + gamma * gae_lambda * next_advantage).masked_fill(~mask[:, step], 0.0)
        advantages[:, step] = next_advantage
        next_value = values[:, step]
    return advantages, advantages + values


@dataclass(frozen=True)
class Whitening:
    """Shift and scale that give the advantages of a whole update mean 0 and deviation 1.

    The moments are those of the update over all ranks, not of a mini-batch, so the result depends neither on the number
    of ranks nor on how answers are split into mini-batches.
    """

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, count: float, total: float, squares: float) -> Whitening:
        """Return the whitening of `count` values with the sum `total` and the sum of squares `squares`."""
        mean = total / max(1.0, count)
        # Rounding can make the difference of the two moments slightly negative.
        variance = max(0.0, squares / max(1.0, count) - mean**2)
        return cls(mean, (variance + VARIANCE_FLOOR) ** 0.5)

    def apply(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the shifted and scaled values, of any shape."""
        return ((values.astype(np.float64) - self.mean) / self.deviation).astype(np.float32)
