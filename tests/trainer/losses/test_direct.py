"""DPO, IPO and KTO against loops in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stagecoach_trainer.losses.direct import ipo_losses, kto_losses, log_ratios, reference_point, sigmoid_losses

BETTER = [3.0, -2.0, 0.0, 40.0, 1.5]
WORSE = [1.0, 5.0, 0.0, -30.0, 1.0]
BETTER_LENGTHS, WORSE_LENGTHS = [3, 7, 1, 20, 5], [4, 2, 1, 9, 50]
LIKED = [True, False, True, False, True]

ratios = st.lists(st.floats(-50, 50), min_size=1, max_size=10)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_log_ratios_are_differences_and_the_reference_gets_no_gradient() -> None:
    policy, reference = tensor(BETTER).requires_grad_(), tensor(WORSE).requires_grad_()
    found = log_ratios(policy, reference)
    found.sum().backward()
    assert found.tolist() == pytest.approx([2.0, -7.0, 0.0, 70.0, 0.5])
    assert policy.grad is not None
    assert policy.grad.tolist() == [1.0] * 5
    assert reference.grad is None


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.0), (0.1, 0.2), (2.0, 0.49)])
def test_dpo_is_the_papers(beta: float, smoothing: float) -> None:
    expected = []
    for better, worse in zip(BETTER, WORSE, strict=True):
        logit = beta * (better - worse)
        right, wrong = math.log1p(math.exp(-logit)), math.log1p(math.exp(logit))
        expected.append((1 - smoothing) * right + smoothing * wrong)
    found = sigmoid_losses(tensor(BETTER), tensor(WORSE), beta, smoothing)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


def test_smoothed_dpo_is_minimal_where_the_implied_probability_is_one_minus_the_smoothing() -> None:
    """The derivative is 0 where σ(beta · lead) = 1 − smoothing."""
    lead = tensor([math.log(0.8 / 0.2) / 0.1]).requires_grad_()
    (gradient,) = torch.autograd.grad(sigmoid_losses(lead, tensor([0.0]), 0.1, 0.2).sum(), lead)
    assert float(gradient) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_the_squared_distance_from_its_target(beta: float) -> None:
    expected = [
        (better / m - worse / n - 1 / (2 * beta)) ** 2
        for better, worse, m, n in zip(BETTER, WORSE, BETTER_LENGTHS, WORSE_LENGTHS, strict=True)
    ]
    lengths = torch.tensor(BETTER_LENGTHS), torch.tensor(WORSE_LENGTHS)
    found = ipo_losses(tensor(BETTER), tensor(WORSE), *lengths, beta)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (1.33, 0.5)])
@pytest.mark.parametrize("point", [0.0, 2.5])
def test_kto_is_the_papers(good: float, bad: float, point: float) -> None:
    expected = [
        good * (1 - sigmoid(0.3 * (ratio - point))) if liked else bad * (1 - sigmoid(0.3 * (point - ratio)))
        for ratio, liked in zip(BETTER, LIKED, strict=True)
    ]
    found = kto_losses(tensor(BETTER), torch.tensor(LIKED), point, 0.3, good, bad)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@given(values=ratios)
def test_ktos_point_is_the_mean_but_never_negative_and_has_no_gradient(values: list[float]) -> None:
    point = reference_point(tensor(values).requires_grad_())
    assert float(point) == pytest.approx(max(0.0, float(np.mean(values))), abs=1e-9)
    assert not point.requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        lambda better, worse: sigmoid_losses(better, worse, 0.3, 0.1),
        lambda better, worse: ipo_losses(better, worse, torch.tensor(BETTER_LENGTHS), torch.tensor(WORSE_LENGTHS), 0.3),
        lambda better, worse: kto_losses(better - worse, torch.tensor(LIKED), 1.0, 0.3, 1.2, 0.7),
    ],
    ids=["dpo", "ipo", "kto"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(loss, (tensor(BETTER).requires_grad_(), tensor(WORSE).requires_grad_()))


@given(values=ratios, shift=st.floats(-50, 50))
def test_dpo_sees_only_the_lead_and_the_policy_of_the_reference_loses_log_two(
    values: list[float], shift: float
) -> None:
    better = tensor(values)
    torch.testing.assert_close(sigmoid_losses(better + shift, better + shift - 1), sigmoid_losses(better, better - 1))
    np.testing.assert_allclose(sigmoid_losses(better, better).numpy(), math.log(2.0))


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_extreme_ratios_stay_finite_in_fp32(logit: float) -> None:
    better = torch.tensor([logit], requires_grad=True)
    liked = torch.tensor([True])
    for loss in (sigmoid_losses(better, torch.zeros(1), 1.0, 0.1), kto_losses(better, liked, 0.0, 1.0)):
        (gradient,) = torch.autograd.grad(loss.sum(), better)
        assert math.isfinite(float(loss.detach()))
        assert math.isfinite(float(gradient))
