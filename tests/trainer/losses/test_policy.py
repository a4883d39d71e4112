"""PPO's clipped objectives against loops in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_trainer.losses.policy import clipped, policy_losses, update_kl, value_losses

log_prob = st.floats(-5, 0)
tokens = st.lists(st.tuples(log_prob, log_prob, st.floats(-3, 3)), min_size=1, max_size=20)
predictions = st.lists(st.tuples(*[st.floats(-5, 5)] * 3), min_size=1, max_size=20)


def columns(rows: list[tuple[float, float, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second, third = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return first, second, third


def policy_oracle(new: float, old: float, advantage: float, clip: float) -> float:
    ratio = math.exp(new - old)
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


@given(rows=tokens, clip=st.floats(0.01, 1.5))
def test_the_policys_objective_is_the_papers(rows: list[tuple[float, float, float]], clip: float) -> None:
    expected = [policy_oracle(*row, clip) for row in rows]
    np.testing.assert_allclose(policy_losses(*columns(rows), clip).numpy(), expected, atol=1e-9)


def test_at_the_old_policy_the_gradient_is_minus_the_advantage() -> None:
    old, advantages = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0.5, -2.0, 0.0])
    new = old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(policy_losses(new, old, advantages).sum(), new)
    assert gradient.tolist() == pytest.approx([-0.5, 2.0, 0.0])


@given(rows=tokens)
def test_tokens_that_are_clipped_are_those_without_a_gradient(rows: list[tuple[float, float, float]]) -> None:
    new, old, advantages = columns([row for row in rows if abs(row[2]) > 1e-6] or [(-1.0, -1.0, 1.0)])
    new.requires_grad_()
    (gradient,) = torch.autograd.grad(policy_losses(new, old, advantages).sum(), new)
    assert torch.equal(gradient == 0, clipped(new, old, advantages))


def test_gradients_of_the_policys_objective_are_those_of_finite_differences() -> None:
    old = torch.full((6,), -1.0, dtype=torch.float64)
    new = (old + torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5, 0.5])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 2.0, 0.3, -1.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: policy_losses(value, old, advantages), (new,))


def test_a_token_that_became_very_likely_has_a_finite_loss() -> None:
    new = torch.tensor([0.0, 0.0], requires_grad=True)
    losses = policy_losses(new, torch.tensor([-300.0, -300.0]), torch.tensor([-1.0, 0.0]))
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


@given(rows=predictions, clip=st.floats(0.01, 3.0))
def test_the_critics_loss_is_the_larger_of_the_free_and_the_clamped_prediction(
    rows: list[tuple[float, float, float]], clip: float
) -> None:
    expected = [
        0.5 * max((new - target) ** 2, (min(max(new, old - clip), old + clip) - target) ** 2)
        for new, old, target in rows
    ]
    np.testing.assert_allclose(value_losses(*columns(rows), clip).numpy(), expected, atol=1e-9)


@given(rows=predictions)
def test_an_unclipped_critic_loses_half_the_squared_error(rows: list[tuple[float, float, float]]) -> None:
    expected = [0.5 * (new - target) ** 2 for new, _, target in rows]
    np.testing.assert_allclose(value_losses(*columns(rows), None).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("clip", [0.2, None])
def test_gradients_of_the_critics_loss_are_those_of_finite_differences(clip: float | None) -> None:
    values = torch.tensor([0.0, 0.1, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: value_losses(value, old, returns, clip), (values,))


def test_the_update_kl_is_that_from_the_old_policy() -> None:
    """Over all tokens, weighted by the old policy, the estimate is the KL itself."""
    old = torch.log_softmax(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), 0)
    new = torch.log_softmax(torch.tensor([0.5, 0.4, -2.0], dtype=torch.float64), 0).requires_grad_()
    estimate = update_kl(new, old)
    assert not estimate.requires_grad
    expected = (old.exp() * (old - new)).sum()
    assert float((old.exp() * estimate).sum()) == pytest.approx(expected.item(), abs=1e-12)
