"""PPO's losses per token (arXiv 1707.06347); the caller masks, sums and divides.

All tensors have the same shape, such as [M] tokens of answers. `log_probs` are those of the current policy, in nats;
`old_log_probs` those of the policy that generated the answers, by the same forward pass. PPO-ptx (arXiv 2203.02155)
adds a weighted next-token loss of text, which needs no function here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stagecoach_trainer.losses.kl import k3

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before exp: fp32 overflows at about 88, and 0 · inf is NaN."""


def probability_ratios(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Return π(token) / π_old(token)."""
    return (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Return -min(ratio · A, clamp(ratio, 1 - clip, 1 + clip) · A) per token."""
    ratios = probability_ratios(log_probs, old_log_probs)
    return -torch.minimum(ratios * advantages, ratios.clamp(1.0 - clip, 1.0 + clip) * advantages)


def clipped(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Return per token (bool) whether its loss is clipped, that is, has no gradient."""
    ratios = probability_ratios(log_probs.detach(), old_log_probs)
    # The minimum takes the clamped branch only where the ratio has already moved the way the advantage points.
    return ((ratios > 1.0 + clip) & (advantages > 0)) | ((ratios < 1.0 - clip) & (advantages < 0))


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    """Return the critic's loss per token: ½ (V - R)².

    With `clip`, the loss is the larger of this and the loss of V clamped to within `clip` of `old_values`: a prediction
    that has moved that far towards the return has no gradient.
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain
    limited = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (limited - returns).square())


def update_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Return an estimate of KL(π_old ‖ π) per token, in nats, at least 0: how far an update has moved the policy."""
    # The tokens were drawn from the old policy, so it takes the first place.
    return k3(old_log_probs, log_probs.detach())
