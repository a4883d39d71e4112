"""How much better an answer's tokens did than the critic expected, and whitening over a batch of any sharing-out.

B answers, padded to T tokens; `mask` [B, T] (bool) is true at tokens that count. What lies elsewhere is never read, be
it no number, and comes out as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""Added to the variance in whitening: equal values become 0, not no number."""


@torch.no_grad()
def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns [B, T], both constants, by generalised advantage estimation (arXiv 1506.02438).

    A_t = Σ_k (gamma · lambda)^k · (r_{t+k} + gamma · V_{t+k+1} − V_{t+k}); behind an answer's last token V is 0, ended
    or cut off. Returns are A + V. Each unbroken stretch of the mask is an answer.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    later_advantage = torch.zeros_like(values[:, 0])
    later_value = torch.zeros_like(values[:, 0])
    for step in reversed(range(values.shape[1])):
        surprise = rewards[:, step] + gamma * later_value - values[:, step]
        later_advantage = (surprise + gamma * gae_lambda * later_advantage).masked_fill(~mask[:, step], 0.0)
        advantages[:, step] = later_advantage
        later_value = values[:, step]
    return advantages, advantages + values


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Return count, sum and sum of squares of the values under the mask [3], fp64.

    Add them up over ranks and micro-batches: then all of them whiten alike.
    """
    counted = values.detach().masked_fill(~mask, 0.0).double()
    return torch.stack((mask.sum().double(), counted.sum(), counted.square().sum()))


def whiten(values: Tensor, mask: Tensor, total: Tensor) -> Tensor:
    """Return the values shifted and scaled to mean 0 and deviation 1 over everything that `total` counts.

    `total`: `moments`, summed. The variance is that of the whole (divided by the count), plus `VARIANCE_FLOOR`.
    """
    count, values_sum, squares_sum = total[0].clamp(min=1.0), total[1], total[2]
    mean = values_sum / count
    variance = (squares_sum / count - mean.square()).clamp(min=0.0)
    white: Tensor = (values.double() - mean) * (variance + VARIANCE_FLOOR).rsqrt()
    return white.to(values.dtype).masked_fill(~mask, 0.0)
