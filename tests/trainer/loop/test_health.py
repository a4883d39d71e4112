"""Signs of useless training in its history: found where they are, and not where training is healthy."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from stagecoach_trainer.loop.health import concerns, exploding, falling, not_finite, rising


def history(losses: list[float], norms: list[float]) -> list[dict[str, float]]:
    return [
        {"step": float(number + 1), "loss": loss, "gradNorm": norm}
        for number, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]


def healthy(seed: int, points: int = 200) -> list[dict[str, float]]:
    """Return a loss that falls as a power law, with noise and the gradient norms of AdamW's first steps."""
    noise = random.Random(seed)
    losses = [2.0 + 6.0 / math.sqrt(1 + number) + noise.gauss(0, 0.05) for number in range(points)]
    norms = [(8.0 if number < 5 else 0.5) * math.exp(noise.gauss(0, 0.7)) for number in range(points)]
    return history(losses, norms)


def test_a_rate_of_10_is_named_at_the_step_at_which_the_norm_exploded() -> None:
    """A run at `learningRate: 10` whose gradient norm reaches 1e9 ended without a word."""
    found = exploding(history([6.0, 9.0, 50.0], [0.7, 1.0e9, 1.1e9]))
    assert found is not None
    assert found.startswith("the gradient norm rose to 1e+09 at step 2, 1,428,571,429 times the usual one before")


@given(st.integers(0, 10_000))
def test_healthy_training_raises_no_concern(seed: int) -> None:
    assert concerns(healthy(seed)) == []


@given(st.integers(0, 1000), st.integers(1, 199), st.floats(101.0, 1e12))
def test_an_explosion_is_found_wherever_it_is_and_stays_the_same_sentence(seed: int, at: int, ratio: float) -> None:
    points = healthy(seed)
    points[at] |= {"gradNorm": ratio * max(point["gradNorm"] for point in points)}
    found = exploding(points[: at + 1])
    assert found is not None
    assert f"at step {at + 1}," in found
    assert exploding(points) == found


def test_a_norm_that_falls_to_0_and_returns_is_no_explosion() -> None:
    assert exploding(history([1.0] * 30, [2.0, *[1e-6] * 28, 1.5])) is None


def test_a_rising_loss_is_named_with_both_values() -> None:
    found = rising(history([3.0 + 0.1 * number for number in range(100)], [1.0] * 100))
    assert found is not None
    assert "the loss rose from 3.45 in the first tenth of the steps to 12.45 in the last" in found


def test_a_short_or_constant_history_says_nothing_about_a_trend() -> None:
    assert rising(history([1.0, 5.0], [1.0, 1.0])) is None
    assert rising(history([1.0] * 100, [1.0] * 100)) is None


def test_measurements_in_the_history_are_no_steps() -> None:
    points = [{"step": 5.0, "heldOut.zh.loss": 3.0}, *healthy(1)]
    assert concerns(points) == []
    assert concerns([]) == []


def rewards(values: list[float]) -> list[dict[str, float]]:
    return [{"step": float(number + 1), "reward": value} for number, value in enumerate(values)]


def test_a_falling_reward_is_named_with_both_values() -> None:
    found = falling(rewards([3.0 - 0.1 * number for number in range(100)]))
    assert found is not None
    assert "the mean reward fell from 2.55 in the first tenth of the updates to -6.45 in the last" in found


@given(st.integers(0, 1000))
def test_a_reward_that_rises_or_stays_raises_no_concern(seed: int) -> None:
    noise = random.Random(seed)
    assert concerns(rewards([math.log1p(number) + noise.gauss(0, 0.1) for number in range(60)])) == []
    assert concerns(rewards([1.0] * 60)) == []


def test_steps_without_training_are_no_usual_norms() -> None:
    """While PPO's critic warms up, the policy's norm is 0."""
    assert exploding(history([1.0] * 6, [0.0, 0.0, 0.0, 2.0, 1e-3, 1.9])) is None
    assert exploding(history([1.0] * 6, [0.0, 0.0, 0.0, 2.0, 1.0, 500.0])) is not None


def test_nan_and_infinity_are_named() -> None:
    figures = {"kl": math.nan, "entropy": 1.0, "reward": -math.inf}
    assert not_finite(figures) == ["`kl` is nan", "`reward` is -inf"]
