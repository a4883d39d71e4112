"""Losses of reward models over pairs of rewards: the better answer's and the worse one's.

Losses are returned per pair (or per reward), so that the caller can weight them and divide by counts of the global
batch. P pairs; a difference of two rewards is the log-odds of the first answer being preferred.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BARRIER_EDGE = 1e-3
"""Distance from the limit at which the barrier continues as a straight line; xtuner clamps the rewards there."""

CALIBRATION_BINS = 10
"""Bins of equal width between the probabilities ½ and 1."""


def pair_losses(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0, centering: float = 0.0) -> Tensor:
    """Return -log σ(r_w - r_l - margin) + centering · (r_w + r_l)² per pair [P], in nats (Bradley-Terry).

    `margin`: required lead of the better answer, as in Llama 2 (arXiv 2307.09288). `centering` keeps rewards around 0
    (arXiv 2312.09244).
    """
    return -F.logsigmoid(better - worse - margin) + centering * (better + worse).square()


def pair_weights(pairs_per_prompt: Tensor) -> Tensor:
    """Return the weight of every pair [P], fp64, by which each prompt counts once: 1 / (pairs of its prompt).

    `pairs_per_prompt` [G]: C(K, 2) of K ranked answers minus the ties (InstructGPT, arXiv 2203.02155); pairs are
    ordered by prompt. A prompt without pairs gets no weight.
    """
    return pairs_per_prompt.double().reciprocal().repeat_interleave(pairs_per_prompt)


def focal_losses(better: Tensor, worse: Tensor, gamma: float = 2.0) -> Tensor:
    """Return -(1 - 2 max(0, P - ½))^gamma · log P with P = σ(r_w - r_l) per pair [P] (COOL, arXiv 2403.17297).

    The weight of a correctly ordered pair decreases with the model's confidence.
    """
    lead = better - worse
    # For P > ½ the weight's base is 2σ(r_l - r_w). It is raised to gamma through its logarithm: the gradient of a power
    # at 0 is infinite for gamma < 1.
    log_weight = (F.logsigmoid(-lead) + math.log(2.0)).clamp(max=0.0)
    return -(gamma * log_weight).exp() * F.logsigmoid(lead)


def barrier(rewards: Tensor, limit: float = 5.0) -> Tensor:
    """Return -(log(x + limit) + log(limit - x)) of every reward x, any shape (COOL, arXiv 2403.17297).

    From `BARRIER_EDGE` inside the limit outwards it continues as the tangent at that edge: a reward outside the limits,
    where the formula is undefined, is pulled back by a finite gradient.
    """
    edge = limit - min(BARRIER_EDGE, limit / 2)
    size = rewards.abs()  # the barrier is symmetric
    inside = size.clamp(max=edge)
    slope = 1.0 / (limit - edge) - 1.0 / (limit + edge)
    return slope * (size - inside) - (limit + inside).log() - (limit - inside).log()


def pair_figures(better: Tensor, worse: Tensor) -> dict[str, float]:
    """Return how well rewards separate better from worse answers: `accuracy`, `margin`, `calibrationError`.

    Accuracy: share of pairs in the right order; ties count ½. Margin: mean of r_w - r_l. Expected calibration error
    (arXiv 1706.04599): the mean over pairs, in bins, of the difference between the predicted probability
    σ(|r_w - r_l|) that the answer with the higher reward is preferred and the rate at which it is.
    Raises ValueError if there are no pairs.
    """
    if not len(better):
        raise ValueError("there are no pairs to measure")
    lead = (better.detach() - worse.detach()).double()
    right = 0.5 * (1.0 + lead.sign())
    confidence = lead.abs().sigmoid()
    bins = ((confidence - 0.5) * (2 * CALIBRATION_BINS)).long().clamp(max=CALIBRATION_BINS - 1)
    # A bin's gap, weighted by its share of the pairs, is the absolute sum of its differences divided by all pairs.
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=lead.device)
    gaps.index_add_(0, bins, right - confidence)
    return {
        "accuracy": float(right.mean()),
        "margin": float(lead.mean()),
        "calibrationError": float(gaps.abs().sum()) / len(lead),
    }
