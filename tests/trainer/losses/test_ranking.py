"""Reward-model losses against loops in fp64 and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stagecoach_trainer.losses.ranking import (
    barrier,
    focal_losses,
    pair_figures,
    pair_losses,
    pair_weights,
)

BETTER = [2.0, -1.0, 0.5, 4.9, -3.0, 0.0]
WORSE = [1.0, 1.5, 0.5, -4.9, -3.5, 2.0]

rewards = st.floats(-4.9, 4.9)
pairs = st.lists(st.tuples(rewards, rewards), min_size=1, max_size=12)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def columns(found: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    return tensor([better for better, _ in found]), tensor([worse for _, worse in found])


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def differentiable(values: list[float]) -> Tensor:
    return tensor(values).requires_grad_()


# -- Bradley-Terry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (1.5, 0.3)])
def test_a_pair_loses_the_log_odds_of_being_preferred_and_its_distance_from_zero(
    margin: float, centering: float
) -> None:
    expected = [
        -math.log(sigmoid(better - worse - margin)) + centering * (better + worse) ** 2
        for better, worse in zip(BETTER, WORSE, strict=True)
    ]
    found = pair_losses(tensor(BETTER), tensor(WORSE), margin, centering)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_the_gradient_of_a_pair_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        lambda better, worse: pair_losses(better, worse, 0.5, 0.1), (differentiable(BETTER), differentiable(WORSE))
    )


@given(found=pairs, shift=st.floats(-50, 50))
def test_a_shift_of_all_rewards_changes_no_pair(found: list[tuple[float, float]], shift: float) -> None:
    better, worse = columns(found)
    torch.testing.assert_close(pair_losses(better + shift, worse + shift), pair_losses(better, worse))


@given(found=pairs, seed=st.integers(0, 99))
def test_the_order_of_pairs_does_not_matter(found: list[tuple[float, float]], seed: int) -> None:
    better, worse = columns(found)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(found)))
    for losses in (pair_losses, focal_losses):
        assert torch.equal(losses(better, worse)[order], losses(better[order], worse[order]))


# -- InstructGPT -------------------------------------------------------------------------------------------------------


def ranked_oracle(prompts: list[list[tuple[float, int]]]) -> float:
    """The loss as the paper writes it, from the rewards and ranks of each prompt's answers."""
    total = 0.0
    for answers in prompts:
        terms = [
            math.log(sigmoid(better - worse))
            for (better, rank), (worse, other) in itertools.permutations(answers, 2)
            if rank < other
        ]
        total -= sum(terms) / len(terms) if terms else 0.0
    return total


def test_every_prompt_of_the_ranked_loss_counts_once_and_ties_are_no_pairs() -> None:
    prompts = [
        [(1.0, 1), (0.2, 2), (0.9, 3), (-1.0, 4)],  # 6 pairs
        [(0.1, 1), (0.3, 1), (-0.4, 2)],  # a tie: 2 pairs
        [(0.5, 1), (0.6, 1)],  # only a tie
        [(-2.0, 1), (2.0, 2)],
    ]
    better, worse, counts = [], [], []
    for answers in prompts:
        found = [(one, other) for (one, a), (other, b) in itertools.permutations(answers, 2) if a < b]
        better += [one for one, _ in found]
        worse += [other for _, other in found]
        counts.append(len(found))
    assert counts == [6, 2, 0, 1]
    losses = pair_losses(tensor(better), tensor(worse)) * pair_weights(torch.tensor(counts))
    assert float(losses.sum()) == pytest.approx(ranked_oracle(prompts), abs=1e-12)


def test_weights_of_a_prompts_pairs_add_up_to_one() -> None:
    assert pair_weights(torch.tensor([1, 0, 4])).tolist() == [1.0, 0.25, 0.25, 0.25, 0.25]


# -- COOL --------------------------------------------------------------------------------------------------------------


def focal_oracle(better: float, worse: float, gamma: float) -> float:
    probability = sigmoid(better - worse)
    return -float((1.0 - 2.0 * max(0.0, probability - 0.5)) ** gamma) * math.log(probability)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_the_focal_loss_is_the_papers(gamma: float) -> None:
    expected = [focal_oracle(better, worse, gamma) for better, worse in zip(BETTER, WORSE, strict=True)]
    np.testing.assert_allclose(focal_losses(tensor(BETTER), tensor(WORSE), gamma).numpy(), expected, atol=1e-12)


@given(better=rewards, worse=rewards, gamma=st.floats(0, 10))
def test_the_focal_loss_is_the_papers_anywhere(better: float, worse: float, gamma: float) -> None:
    found = float(focal_losses(tensor([better]), tensor([worse]), gamma))
    assert found == pytest.approx(focal_oracle(better, worse, gamma), abs=1e-9)


def test_pairs_in_the_wrong_order_have_the_plain_loss() -> None:
    better, worse = tensor([-1.0, 0.0]), tensor([1.0, 0.0])
    torch.testing.assert_close(focal_losses(better, worse), pair_losses(better, worse))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_gradient_of_the_focal_loss_is_that_of_finite_differences(gamma: float) -> None:
    apart = [(better, worse) for better, worse in zip(BETTER, WORSE, strict=True) if better != worse]  # not at the kink
    better, worse = (item.requires_grad_() for item in columns(apart))
    assert torch.autograd.gradcheck(lambda one, other: focal_losses(one, other, gamma), (better, worse))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("lead", [-1e4, -200.0, 0.0, 40.0, 200.0, 1e4])
def test_the_focal_loss_is_finite_however_sure_the_model_is(gamma: float, lead: float) -> None:
    better = torch.tensor([lead], requires_grad=True)
    loss = focal_losses(better, torch.zeros(1), gamma)
    (gradient,) = torch.autograd.grad(loss.sum(), better)
    assert math.isfinite(float(loss.detach()))
    assert math.isfinite(float(gradient))
    if lead >= 200:
        assert float(loss.detach()) == float(gradient) == 0.0


@pytest.mark.parametrize("limit", [1.0, 5.0])
def test_the_barrier_is_the_papers_inside_the_limits(limit: float) -> None:
    inside = [part * limit for part in (-0.99, -0.5, 0.0, 0.3, 0.998)]
    expected = [-(math.log(x + limit) + math.log(limit - x)) for x in inside]
    np.testing.assert_allclose(barrier(tensor(inside), limit).numpy(), expected, atol=1e-12)


def test_the_gradient_of_the_barrier_is_that_of_finite_differences_on_both_sides_of_its_edge() -> None:
    points = differentiable([-7.0, -5.0, -4.9, -1.0, 0.0, 0.5, 4.99, 5.0, 30.0])
    assert torch.autograd.gradcheck(barrier, (points,), eps=1e-7)


def test_beyond_its_edge_the_barrier_is_the_tangent_at_the_edge() -> None:
    slope = 1 / 0.001 - 1 / 9.999
    at_edge = -(math.log(9.999) + math.log(0.001))
    found = barrier(tensor([4.999, 5.0, 6.0, -6.0, 1e6]))
    beyond = [0.0, 0.001, 1.001, 1.001, 1e6 - 4.999]
    np.testing.assert_allclose(found.numpy(), [at_edge + slope * part for part in beyond], rtol=1e-12)


# -- figures -----------------------------------------------------------------------------------------------------------


def calibration_oracle(leads: list[float]) -> float:
    """Expected calibration error by its definition, bin by bin."""
    total = 0.0
    for bin_index in range(10):
        low, high = 0.5 + 0.05 * bin_index, 0.55 + 0.05 * bin_index
        inside = [x for x in leads if low <= sigmoid(abs(x)) < high or (bin_index == 9 and sigmoid(abs(x)) >= 1.0)]
        if inside:
            right = np.mean([1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in inside])
            sure = np.mean([sigmoid(abs(x)) for x in inside])
            total += len(inside) / len(leads) * abs(float(right) - float(sure))
    return total


def test_figures_are_those_of_their_definitions() -> None:
    random = np.random.default_rng(3)
    better, worse = random.normal(0.5, 1.5, 400), random.normal(0.0, 1.5, 400)
    found = pair_figures(torch.from_numpy(better), torch.from_numpy(worse))
    assert found["accuracy"] == pytest.approx(float((better > worse).mean()))
    assert found["margin"] == pytest.approx(float((better - worse).mean()))
    assert found["calibrationError"] == pytest.approx(calibration_oracle(list(better - worse)), abs=1e-12)


def test_a_tie_is_half_right() -> None:
    assert pair_figures(tensor([1.0, 1.0]), tensor([1.0, 0.0]))["accuracy"] == 0.75


def test_a_model_that_is_right_as_often_as_it_predicts_is_calibrated() -> None:
    lead = math.log(3.0)  # predicts 3 of 4
    figures = pair_figures(tensor([lead, lead, lead, 0.0]), tensor([0.0, 0.0, 0.0, lead]))
    assert figures["calibrationError"] == pytest.approx(0.0, abs=1e-12)


@given(found=pairs)
def test_the_worst_calibration_is_one_and_swapped_pairs_have_the_other_accuracy(
    found: list[tuple[float, float]],
) -> None:
    better, worse = columns(found)
    figures, swapped = pair_figures(better, worse), pair_figures(worse, better)
    assert 0.0 <= figures["calibrationError"] <= 1.0
    assert figures["accuracy"] + swapped["accuracy"] == pytest.approx(1.0)
    assert figures["margin"] == pytest.approx(-swapped["margin"])


def test_figures_of_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no pair"):
        pair_figures(tensor([]), tensor([]))
