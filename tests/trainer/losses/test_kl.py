"""Estimators of the KL against the KL itself, and its coefficient against the paper's rule."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stagecoach_trainer.losses.kl import (
    AdaptiveKlController,
    FixedKlController,
    answer_sums,
    k1,
    k3,
    kl_controller,
    token_rewards,
)

Estimate = Callable[[Tensor, Tensor], Tensor]

log_probs = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20)

MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False, True, True, True]])


def per_token() -> torch.Tensor:
    """Random values under the mask, NaN elsewhere."""
    figures = torch.arange(12, dtype=torch.float64).reshape(3, 4) / 7
    return figures.masked_fill(~MASK, torch.nan)


@given(rows=log_probs)
def test_token_estimates_are_their_formulas(rows: list[tuple[float, float]]) -> None:
    policy, reference = torch.tensor(rows, dtype=torch.float64).unbind(1)
    np.testing.assert_allclose(k1(policy, reference).numpy(), [p - r for p, r in rows])
    expected = [math.exp(r - p) - 1 - (r - p) for p, r in rows]
    np.testing.assert_allclose(k3(policy, reference).numpy(), expected, rtol=1e-9, atol=1e-9)
    assert (k3(policy, reference) >= 0).all()


@pytest.mark.parametrize("estimate", [k1, k3])
def test_the_mean_of_an_estimate_under_the_policy_is_the_kl(estimate: Estimate) -> None:
    policy = torch.log_softmax(torch.tensor([2.0, 0.0, -1.0, 0.3], dtype=torch.float64), 0)
    reference = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0, 0.3], dtype=torch.float64), 0)
    expected = torch.nn.functional.kl_div(reference, policy, reduction="sum", log_target=True)
    assert float((policy.exp() * estimate(policy, reference)).sum()) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("estimate", [k1, k3])
def test_gradients_of_an_estimate_are_those_of_finite_differences(estimate: Estimate) -> None:
    policy = torch.tensor([-1.0, -3.0, -0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-2.0, -1.0, -0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(estimate, (policy, reference))


def test_nearly_equal_policies_have_an_exact_small_kl_in_fp32() -> None:
    found = k3(torch.tensor([0.0]), torch.tensor([1e-3]))
    assert float(found) == pytest.approx(5e-7, rel=1e-2)


def test_an_answers_sum_is_that_of_its_tokens() -> None:
    expected = [np.nansum(row) for row in per_token().numpy()]
    np.testing.assert_allclose(answer_sums(per_token(), MASK).numpy(), expected)


def test_every_token_pays_and_the_last_one_gets_the_score() -> None:
    scores = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    found = token_rewards(scores, per_token(), MASK, 0.5)
    expected = np.nan_to_num(-0.5 * per_token().numpy())
    expected[0, 2] += 10
    expected[1, 0] += 20
    expected[2, 3] += 30
    np.testing.assert_allclose(found.numpy(), expected)


def test_the_rewards_of_an_answer_add_up_to_its_score_less_the_price() -> None:
    scores = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    total = token_rewards(scores, per_token(), MASK, 0.02).sum(-1)
    np.testing.assert_allclose(total.numpy(), (scores - 0.02 * answer_sums(per_token(), MASK)).numpy())


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 256 / 10000), (60.0, 1 + 0.2 * 256 / 10000), (-3.0, 1 - 0.2 * 256 / 10000)],
    ids=["at the target", "a tenth above", "far above", "negative"],
)
def test_the_adaptive_price_follows_the_papers_rule(kl: float, factor: float) -> None:
    price = AdaptiveKlController(0.15, target=6.0, horizon=10000)
    assert price.after(kl, 256).coefficient == pytest.approx(0.15 * factor, abs=1e-12)
    assert price.coefficient == 0.15


@given(kls=st.lists(st.floats(-100, 1000), max_size=30), answers=st.integers(1, 1_000_000))
def test_the_adaptive_price_stays_above_zero_however_large_the_updates(kls: list[float], answers: int) -> None:
    price = AdaptiveKlController(0.15, target=6.0, horizon=10000)
    for kl in kls:
        price = price.after(kl, answers)
        assert price.coefficient > 0


def test_a_price_without_a_target_is_fixed() -> None:
    assert kl_controller(0.02, None, 10000).after(1e9, 100) == FixedKlController(0.02)
    assert kl_controller(0.02, 6.0, 100) == AdaptiveKlController(0.02, 6.0, 100)
