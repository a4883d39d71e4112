"""Learning from preferences without a reward model: DPO, IPO and KTO.

A log-ratio is log π(answer | prompt) − log π_ref(answer | prompt), each summed over the answer's tokens, in nats. beta
times it is the reward that the policy implies. P pairs, S single answers; losses are given one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratios(policy: Tensor, reference: Tensor) -> Tensor:
    """Return the log-ratios [S] of summed log-probabilities; the reference is never learnt."""
    return policy - reference.detach()


def sigmoid_losses(better: Tensor, worse: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Return −log σ(beta · (log-ratio of the better answer − that of the worse one)) per pair [P] (arXiv 2305.18290).

    `label_smoothing`: share of preferences taken to be the wrong way round (conservative DPO): that share of the loss
    is the loss of the swapped pair.
    """
    logit = beta * (better - worse)
    return -(1.0 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def ipo_losses(
    better: Tensor, worse: Tensor, better_lengths: Tensor, worse_lengths: Tensor, beta: float = 0.1
) -> Tensor:
    """Return (difference of the mean log-ratios per token − 1 / (2 beta))² per pair [P] (arXiv 2310.12036).

    `better_lengths` and `worse_lengths` [P]: tokens of the answers, at least 1. The paper's sums over tokens favour
    long answers; its authors take means.
    """
    lead = better / better_lengths - worse / worse_lengths
    return (lead - 1.0 / (2.0 * beta)).square()


def kl_point(mismatched: Tensor) -> Tensor:
    """Return KTO's reference point z₀: an estimate of KL(policy ‖ reference), never below 0, without a gradient.

    `mismatched` [S]: log-ratios of answers to prompts that are not theirs (arXiv 2402.01306), or, coarser, of the
    batch's own answers. Give it those of the whole global batch: the point must not depend on the number of ranks.
    """
    return mismatched.detach().double().mean().clamp(min=0.0).to(mismatched.dtype)


def kto_losses(
    ratios: Tensor,
    liked: Tensor,
    point: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return KTO's loss of every answer [S]: weight · (1 − σ(±beta · (log-ratio − z₀))) (arXiv 2402.01306).

    The sign is + for an answer that is `liked` [S] (bool), − for one that is not; `point` is z₀ from `kl_point`.
    """
    logit = beta * (ratios - point)
    return torch.where(liked, desirable_weight * (-logit).sigmoid(), undesirable_weight * logit.sigmoid())
