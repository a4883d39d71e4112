"""How far a policy is from its reference, token by token, and what that costs it.

Estimators of KL(policy ‖ reference) from tokens drawn from the policy; log-probabilities and KL in nats. B answers,
padded to T tokens; `mask` [B, T] (bool) is true at tokens of answers; what lies elsewhere is never read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_ERROR = 0.2
"""Farthest relative error that steers the price at once (arXiv 1909.08593)."""


def k1(policy: Tensor, reference: Tensor) -> Tensor:
    """Return log π − log π_ref of every token: unbiased, of either sign; what PPO takes off the reward."""
    return policy - reference


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """Return q − 1 − log q with q = π_ref / π of every token: unbiased too, never below 0, of smaller variance.

    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    log_q = reference - policy
    return torch.expm1(log_q) - log_q


def answer_sums(per_token: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over every answer's tokens [B]."""
    return per_token.masked_fill(~mask, 0.0).sum(-1)


def token_rewards(scores: Tensor, token_kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Return the reward of every token [B, T]: −coefficient · KL everywhere, plus the answer's score at its last token.

    `scores` [B], `token_kl` [B, T], such as `k1`. An answer without tokens has nowhere to put its score: drop it first.
    """
    rewards = (-coefficient * token_kl).masked_fill(~mask, 0.0)
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return rewards + torch.where(is_last, scores[:, None], 0.0)


@dataclass(frozen=True)
class FixedKl:
    """A price that stays."""

    coefficient: float
    """Taken off the reward per nat."""

    def after(self, kl: float, num_answers: int) -> FixedKl:
        """Return the price after an update: the same, whatever the KL."""
        return self


@dataclass(frozen=True)
class AdaptiveKl:
    """A price that steers the KL per answer to a target (arXiv 1909.08593)."""

    coefficient: float
    """Taken off the reward per nat, in the next update."""

    target: float
    """KL per answer, in nats, above 0."""

    horizon: int
    """Answers over which the steering works."""

    def after(self, kl: float, num_answers: int) -> AdaptiveKl:
        """Return the price after an update with the mean KL `kl` per answer over `num_answers` answers.

        coefficient · (1 + error · answers / horizon), the relative error held within ±`MAX_ERROR`. An update of more
        answers than the horizon counts as one of the horizon: else one update could make the price 0 or negative.
        """
        error = min(max(kl / self.target - 1.0, -MAX_ERROR), MAX_ERROR)
        share = min(num_answers / self.horizon, 1.0)
        return replace(self, coefficient=self.coefficient * (1.0 + error * share))


def kl_price(coefficient: float, target: float | None, horizon: int) -> FixedKl | AdaptiveKl:
    """Return the price that a stage begins, or goes on, with: fixed where there is no target."""
    return FixedKl(coefficient) if target is None else AdaptiveKl(coefficient, target, horizon)
