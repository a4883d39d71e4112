"""Generalised advantages against the double sum of the paper; whitening against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_trainer.losses.advantages import Whitening, generalized_advantages


def advantages_of_one(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """The double sum, in fp64, of an answer without padding."""
    count = len(rewards)
    following = np.append(values[1:], 0.0)
    deltas = rewards + gamma * following - values
    return np.array([sum((gamma * lam) ** k * deltas[t + k] for k in range(count - t)) for t in range(count)])


def batch(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and mask; NaN after each answer."""
    random = np.random.default_rng(seed)
    width = max(lengths) + 2
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.from_numpy(random.normal(size=(len(lengths), width))) for _ in range(2))
    return rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.nan), mask


def whitening_of(ranks: list[np.ndarray]) -> Whitening:
    """From the moments of every rank's values, added up in fp64."""
    exact = [values.astype(np.float64) for values in ranks]
    moments = np.sum([(len(values), values.sum(), np.square(values).sum()) for values in exact], axis=0)
    return Whitening.of(*map(float, moments))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_advantages_are_the_papers_for_any_padding(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    rewards, values, mask = batch(lengths, seed)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = advantages_of_one(rewards[row, :length].numpy(), values[row, :length].numpy(), gamma, lam)
        np.testing.assert_allclose(advantages[row, :length].numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(returns[row, :length].numpy(), expected + values[row, :length].numpy(), atol=1e-9)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_without_discount_the_returns_at_lambda_one_are_the_rewards_still_to_come() -> None:
    rewards, values, mask = batch([6])
    _, returns = generalized_advantages(rewards, values, mask, 1.0, 1.0)
    expected = np.cumsum(rewards[0, :6].numpy()[::-1])[::-1]
    np.testing.assert_allclose(returns[0, :6].numpy(), expected, atol=1e-12)


def test_answers_may_begin_after_a_prompt_of_any_length() -> None:
    rewards, values, mask = batch([4])
    moved_rewards, moved_values, moved_mask = (
        torch.cat((item.new_zeros(1, 3), item), dim=1) for item in (rewards, values, mask)
    )
    plain, _ = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    moved, _ = generalized_advantages(moved_rewards, moved_values, moved_mask, 0.9, 0.8)
    assert torch.equal(moved[:, 3:], plain)
    assert not moved[:, :3].any()


def test_advantages_in_fp32_are_those_of_fp64_and_have_no_gradient() -> None:
    rewards, values, mask = batch([30, 12])
    exact, _ = generalized_advantages(rewards, values, mask)
    single, returns = generalized_advantages(rewards.float(), values.float().requires_grad_(), mask)
    assert not single.requires_grad
    assert not returns.requires_grad
    np.testing.assert_allclose(single.numpy(), exact.numpy(), atol=2e-6)


@pytest.mark.parametrize("parts", [1, 2, 3], ids=["one rank", "two ranks", "three ranks"])
def test_whitening_is_that_of_the_whole_update_on_any_number_of_ranks(parts: int) -> None:
    values = [np.random.default_rng(seed).normal(size=length) for seed, length in enumerate([7, 3, 9, 1, 5, 2])]
    counted = np.concatenate(values)
    expected = (counted - counted.mean()) / np.sqrt(counted.var() + 1e-8)
    whitening = whitening_of([np.concatenate(values[rank::parts]) for rank in range(parts)])
    assert whitening.mean == pytest.approx(counted.mean(), abs=1e-9)
    assert whitening.deviation == pytest.approx(np.sqrt(counted.var() + 1e-8), abs=1e-9)
    white = np.concatenate([whitening.apply(value.astype(np.float32)) for value in values])
    np.testing.assert_allclose(white, expected, atol=1e-6)


def test_whitened_values_have_mean_zero_and_deviation_one() -> None:
    values = 1000.0 + 3.0 * np.random.default_rng(2).normal(size=110).astype(np.float32)
    white = whitening_of([values]).apply(values)
    assert float(white.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(white.std()) == pytest.approx(1.0, abs=1e-6)


def test_equal_values_and_none_at_all_become_zeros() -> None:
    equal = np.full(6, 0.1, np.float32)
    assert np.abs(whitening_of([equal]).apply(equal)).max() < 1e-3
    nothing = np.empty(0, np.float32)
    assert not whitening_of([nothing]).apply(nothing).any()
