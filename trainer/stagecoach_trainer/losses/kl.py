"""Estimators of KL(policy ‖ reference) per token, and controllers of the coefficient with which it is penalised.

Tokens are drawn from the policy; log-probabilities and KL are in nats. B answers, padded to T tokens; `mask` [B, T]
(bool) is true at the answers' tokens, and values at other positions are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_ERROR = 0.2
"""Limit of the relative error that one adjustment of the coefficient uses (arXiv 1909.08593)."""


def k1(policy: Tensor, reference: Tensor) -> Tensor:
    """Return log π - log π_ref per token: unbiased, of either sign. PPO subtracts it from the reward."""
    return policy - reference


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """Return q - 1 - log q with q = π_ref / π per token: also unbiased, at least 0, and of smaller variance.

    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    log_q = reference - policy
    return torch.expm1(log_q) - log_q  # expm1: q - 1 loses its digits where q is near 1


def answer_sums(per_token: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over each answer's tokens [B]."""
    # Not a product with the mask: values at padding may be inf or NaN, and 0 * NaN is NaN.
    return per_token.masked_fill(~mask, 0.0).sum(-1)


def token_rewards(scores: Tensor, token_kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Return the reward of every token [B, T]: -coefficient · KL, plus the answer's score at its last token
    (arXiv 2203.02155).

    `scores` [B]; `token_kl` [B, T], such as `k1`. The score of an answer without tokens is lost, so drop such answers
    beforehand.
    """
    rewards = (-coefficient * token_kl).masked_fill(~mask, 0.0)
    # Counted from the right, the last token of an answer is the first one under the mask.
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return rewards + torch.where(is_last, scores[:, None], 0.0)


@dataclass(frozen=True)
class FixedKlController:
    """A constant coefficient."""

    coefficient: float
    """Penalty subtracted from the reward per nat."""

    def after(self, kl: float, num_answers: int) -> FixedKlController:
        """Return the controller after an update: the same for any KL."""
        return self


@dataclass(frozen=True)
class AdaptiveKlController:
    """A coefficient that steers the KL per answer towards a target (arXiv 1909.08593)."""

    coefficient: float
    """Penalty subtracted from the reward per nat in the next update."""

    target: float
    """KL per answer, in nats, above 0."""

    horizon: int
    """Number of answers over which an error is corrected."""

    def after(self, kl: float, num_answers: int) -> AdaptiveKlController:
        """Return the controller after an update with the mean KL `kl` per answer over `num_answers` answers.

        The new coefficient is coefficient · (1 + error · answers / horizon), with the relative error clamped to
        ±`MAX_ERROR`. An update with more answers than the horizon counts as one of the horizon: otherwise a single
        update could make the coefficient 0 or negative.
        """
        error = min(max(kl / self.target - 1.0, -MAX_ERROR), MAX_ERROR)
        share = min(num_answers / self.horizon, 1.0)
        return replace(self, coefficient=self.coefficient * (1.0 + error * share))


def kl_controller(coefficient: float, target: float | None, horizon: int) -> FixedKlController | AdaptiveKlController:
    """Return a controller with this coefficient: adaptive if there is a target, else fixed."""
    return FixedKlController(coefficient) if target is None else AdaptiveKlController(coefficient, target, horizon)
