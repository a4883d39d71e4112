"""The moving average of a policy's weights: its formula, and that it outlives a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagecoach_trainer.ppo import weight_average
from stagecoach_trainer.ppo.loop import train_policy
from stagecoach_trainer.ppo.weight_average import WeightAverage
from stagecoach_trainer.runtime.errors import Interrupted
from tests.trainer.loop.makers import context, equal_weights, weights
from tests.trainer.ppo.makers import FunctionTerm, configuration, ppo_job, reward_of

UPDATES, SAMPLES, DECAY = 4, 8, 0.75
Weights = dict[str, torch.Tensor]


def trained(here: Path, decay: float | None, stop_after: int | None = None) -> Weights:
    """The policy's weights after the stage. `stop_after`: judged answers after which it is asked to stop."""
    at = context(here)

    def judged(prompt: str, answer: str) -> float:
        if stop_after is not None and len(term.asked) >= stop_after:
            at.stop.set()
        return sum(map(ord, answer)) / 100

    term = FunctionTerm(judged)
    config = configuration(
        batch={"samples": SAMPLES, "microBatchRows": 4},
        budget={"steps": UPDATES},
        rollout={"maxNewTokens": 4, "batchRows": 4},
        policy={"averageDecay": decay},
        precision="bf16",
    )
    job = ppo_job(config, reward_of(("only", term, 1.0)))
    train_policy(job, at)
    return weights(job.policy)


def test_the_result_is_the_average_over_all_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, np.ndarray]] = []

    class Noting(WeightAverage):
        def __init__(self, decay: float, weights: weight_average.Weights) -> None:
            super().__init__(decay, noted(weights))

        def follow(self, weights: weight_average.Weights) -> None:
            super().follow(noted(weights))

    def noted(weights: weight_average.Weights) -> list[tuple[str, torch.Tensor]]:
        found = [(name, weight.clone()) for name, weight in weights]
        seen.append({name: weight.double().numpy() for name, weight in found})
        return found

    monkeypatch.setattr("stagecoach_trainer.ppo.loop.WeightAverage", Noting)
    result = trained(tmp_path / "averaged", DECAY)
    assert len(seen) == 1 + UPDATES
    shares = [DECAY**UPDATES, *((1.0 - DECAY) * DECAY ** (UPDATES - number) for number in range(1, UPDATES + 1))]
    for name, found in result.items():
        expected = sum(share * weights[name] for share, weights in zip(shares, seen, strict=True))
        np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-6)
    last = trained(tmp_path / "last", None)
    assert all(np.array_equal(last[name].double().numpy(), weight) for name, weight in seen[-1].items())
    assert not equal_weights(last, result)


def test_a_stopped_stage_ends_with_the_average_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", DECAY)
    with pytest.raises(Interrupted):
        trained(tmp_path / "stopped", DECAY, stop_after=2 * SAMPLES + 2)
    assert equal_weights(trained(tmp_path / "stopped", DECAY), whole)


def test_without_decay_the_average_is_the_weights_themselves() -> None:
    tensors: dict[str, Any] = {"a": torch.tensor([1.0, 2.0])}
    found = WeightAverage(0.0, tensors.items())
    found.follow([("a", torch.tensor([5.0, -1.0], dtype=torch.bfloat16))])
    assert found.tensors["a"].tolist() == [5.0, -1.0]
    assert tensors["a"].tolist() == [1.0, 2.0], "the policy's own weights are left alone"
