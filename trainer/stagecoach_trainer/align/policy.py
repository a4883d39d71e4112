"""PPO's objectives, token by token (arXiv 1707.06347); the caller masks, sums and divides.

All tensors have one shape, such as [M] tokens of answers. `log_probs` are those of the policy as it is now, in nats;
`old_log_probs` those of the policy that wrote the answers, by the same forward pass. PPO-ptx (arXiv 2203.02155) only
adds the weighted next-token loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stagecoach_trainer.align.kl import k3

MAX_LOG_RATIO = 20.0
"""Farthest log-ratio whose exponential is taken: beyond it fp32 would soon overflow, and 0 · ∞ is no number."""


def probability_ratios(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Return π(token) / π_old(token)."""
    return (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Return −min(ratio · A, clamp(ratio, 1 − clip, 1 + clip) · A) of every token."""
    ratios = probability_ratios(log_probs, old_log_probs)
    return -torch.minimum(ratios * advantages, ratios.clamp(1.0 - clip, 1.0 + clip) * advantages)


def clipped(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Return of every token (bool) whether it is clipped, that is, teaches the policy nothing more."""
    ratios = probability_ratios(log_probs.detach(), old_log_probs)
    return ((ratios > 1.0 + clip) & (advantages > 0)) | ((ratios < 1.0 - clip) & (advantages < 0))


def clipped_share(is_clipped: Tensor, mask: Tensor) -> Tensor:
    """Return the share of tokens under the mask (bool) that are clipped, fp64; 0 where there is none."""
    return (is_clipped & mask).sum().double() / mask.sum().clamp(min=1)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    """Return the critic's loss of every token: ½ (V − R)².

    With `clip`, the larger of it and the loss of V held within `clip` of `old_values`: a prediction that has moved that
    far towards the return learns no more.
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (held - returns).square())


def update_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Return the estimate of KL(π_old ‖ π) at every token, in nats, never below 0: how far an update has gone."""
    return k3(old_log_probs, log_probs.detach())
