"""What a reward model minimises: losses over pairs of rewards, the better answer's and the worse one's.

Every loss is given per pair (or per reward), so that the caller can weigh it and divide by counts of the global batch.
P pairs; rewards in the unit of the reward model's head, a difference of which is the log-odds of being preferred.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BARRIER_EDGE = 1e-3
"""Distance from the limit at which the barrier goes on as a straight line; xtuner clamps the rewards there."""

CALIBRATION_BINS = 10
"""Bins of equal width between the probabilities ½ and 1."""


def pair_losses(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0, centering: float = 0.0) -> Tensor:
    """Return −log σ(r_w − r_l − margin) + centering · (r_w + r_l)² of every pair [P], in nats (Bradley–Terry).

    `margin`: by how much the better answer should lead, as in LLaMA 2 (arXiv 2307.09288). `centering` keeps rewards
    around 0 (arXiv 2312.09244).
    """
    return -F.logsigmoid(better - worse - margin) + centering * (better + worse).square()


def pair_weights(pairs_per_prompt: Tensor) -> Tensor:
    """Return the weight of every pair [P], fp64, that makes each prompt count once: 1 / (pairs of its prompt).

    `pairs_per_prompt` [G]: C(K, 2) of K ranked answers less the ties (InstructGPT, arXiv 2203.02155); pairs of a prompt
    lie side by side, in the order of the prompts. A prompt without pairs has no weight anywhere.
    """
    return pairs_per_prompt.double().reciprocal().repeat_interleave(pairs_per_prompt)


def ranked_losses(better: Tensor, worse: Tensor, pairs_per_prompt: Tensor) -> Tensor:
    """Return InstructGPT's K-ranked loss as weighted pairs [P]; their sum is a sum over prompts.

    `pairs_per_prompt` as in `pair_weights`.
    """
    return pair_losses(better, worse) * pair_weights(pairs_per_prompt).to(better.dtype)


def focal_losses(better: Tensor, worse: Tensor, gamma: float = 2.0) -> Tensor:
    """Return −(1 − 2 max(0, P − ½))^gamma · log P with P = σ(r_w − r_l) of every pair [P] (COOL, arXiv 2403.17297).

    A pair in the right order weighs the less, the surer the model is of it. The weight is 2σ(r_l − r_w) there, and is
    taken as the exponential of its logarithm: it reaches 0 without a power of 0, whose gradient is infinite for
    gamma < 1.
    """
    lead = better - worse
    log_weight = (F.logsigmoid(-lead) + math.log(2.0)).clamp(max=0.0)
    return -(gamma * log_weight).exp() * F.logsigmoid(lead)


def barrier(rewards: Tensor, limit: float = 5.0) -> Tensor:
    """Return −(log(x + limit) + log(limit − x)) of every reward x, any shape (COOL, arXiv 2403.17297).

    From `BARRIER_EDGE` before the limit on, and beyond it, it is the tangent at that edge: a reward that has left the
    limits is pulled back with a finite force, where the formula has no value.
    """
    edge = limit - min(BARRIER_EDGE, limit / 2)
    size = rewards.abs()
    inside = size.clamp(max=edge)
    slope = 1.0 / (limit - edge) - 1.0 / (limit + edge)
    return slope * (size - inside) - (limit + inside).log() - (limit - inside).log()


def pair_figures(better: Tensor, worse: Tensor) -> dict[str, float]:
    """Return how well rewards tell better answers from worse ones: `accuracy`, `margin`, `calibrationError`.

    Accuracy: share of pairs in the right order, an equal pair is half right. Margin: mean of r_w − r_l. Expected
    calibration error (arXiv 1706.04599): the model says of the answer it prefers that it is preferred with the
    probability σ(|r_w − r_l|); by how much that differs from how often it is, the mean over pairs, in bins.
    ValueError: there is no pair.
    """
    if not len(better):
        raise ValueError("there is no pair to measure")
    lead = (better.detach() - worse.detach()).double()
    right = 0.5 * (1.0 + lead.sign())
    sure = lead.abs().sigmoid()
    bins = ((sure - 0.5) * (2 * CALIBRATION_BINS)).long().clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=lead.device).index_add_(0, bins, right - sure)
    return {
        "accuracy": float(right.mean()),
        "margin": float(lead.mean()),
        "calibrationError": float(gaps.abs().sum()) / len(lead),
    }
