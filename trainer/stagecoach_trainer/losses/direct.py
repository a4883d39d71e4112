"""Losses that learn from preferences without a reward model: DPO, IPO and KTO.

A log-ratio is log π(answer | prompt) - log π_ref(answer | prompt), each summed over the answer's tokens, in nats; beta
times the log-ratio is the reward that the policy implies (arXiv 2305.18290). P pairs, S single answers; losses are
returned unreduced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratios(policy: Tensor, reference: Tensor) -> Tensor:
    """Return the log-ratios [S] of summed log-probabilities; no gradient flows into the reference."""
    return policy - reference.detach()


def sigmoid_losses(better: Tensor, worse: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Return -log σ(beta · (log-ratio of the better answer - log-ratio of the worse one)) per pair [P]
    (arXiv 2305.18290).

    `label_smoothing`: assumed share of preferences with swapped labels (conservative DPO); the loss of the swapped pair
    gets this weight.
    """
    logit = beta * (better - worse)
    return -(1.0 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def ipo_losses(
    better: Tensor, worse: Tensor, better_lengths: Tensor, worse_lengths: Tensor, beta: float = 0.1
) -> Tensor:
    """Return (difference of the mean log-ratios per token - 1 / (2 beta))² per pair [P] (arXiv 2310.12036).

    `better_lengths` and `worse_lengths` [P]: tokens of the answers, at least 1. The paper sums over tokens, which
    favours long answers; its authors' implementation takes means, and so does this one.
    """
    lead = better / better_lengths - worse / worse_lengths
    return (lead - 1.0 / (2.0 * beta)).square()


def reference_point(mismatched: Tensor) -> Tensor:
    """Return KTO's reference point z₀: an estimate of KL(policy ‖ reference), at least 0, without gradient.

    `mismatched` [S]: log-ratios of answers paired with other prompts (arXiv 2402.01306) or, as a coarser estimate, of
    the batch's own answers. Pass those of the whole global batch, so that z₀ does not depend on the number of ranks.
    """
    # The KL is never negative, but its estimate from a few samples can be.
    return mismatched.detach().double().mean().clamp(min=0.0).to(mismatched.dtype)


def kto_losses(
    ratios: Tensor,
    liked: Tensor,
    point: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return KTO's loss of every answer [S]: weight · (1 - σ(±beta · (log-ratio - z₀))) (arXiv 2402.01306).

    The sign is + for an answer that is `liked` [S] (bool) and - for the others; `point` is z₀ from `reference_point`.
    """
    logit = beta * (ratios - point)
    # 1 - σ(x) is σ(-x), which keeps its precision where σ(x) rounds to 1.
    return torch.where(liked, desirable_weight * (-logit).sigmoid(), undesirable_weight * logit.sigmoid())
