"""The update's losses against an independent computation from transformers' full logits, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stagecoach_api.kinds.ppo import PolicyLoss
from stagecoach_trainer.batches.rows import IGNORE, Ids, Row
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.kernels.answer_log_probs import collate_answers
from stagecoach_trainer.losses.advantages import Whitening
from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.ppo.experience import Experience
from stagecoach_trainer.ppo.objectives import (
    CriticObjective,
    PolicyObjective,
    collate_experiences,
)
from tests.trainer.ppo.makers import digit_model

CPU = torch.device("cpu")
LENGTHS = ((3, 4), (5, 1), (2, 6))
"""Tokens of prompt and answer."""


def experiences(seed: int = 2) -> list[Experience]:
    random = np.random.default_rng(seed)
    made = []
    for prompt_length, length in LENGTHS:
        prompt, answer = (random.integers(0, 13, n).astype(np.int32) for n in (prompt_length, length))
        log_probs = random.normal(-2.5, 0.4, length).astype(np.float32)
        others = (random.normal(0, 1, length).astype(np.float32) for _ in range(3))
        made.append(Experience(prompt, answer, log_probs, *others))
    return made


def pairs(chunk: list[Experience]) -> list[tuple[Ids, Ids]]:
    return [(item.prompt, item.answer) for item in chunk]


def full_states(model: Any, item: Experience, read: Callable[[Any], Tensor]) -> Tensor:
    """The logits of `model` before each token of one answer, computed alone and at every position."""
    ids = torch.from_numpy(np.concatenate([item.prompt, item.answer])).long()[None]
    return read(model(input_ids=ids))[0, len(item.prompt) - 1 : -1]


def full_log_p(model: Any, item: Experience, temperature: float) -> Tensor:
    logits = full_states(model, item, lambda output: output.logits)
    return torch.log_softmax(logits.double() / temperature, -1)


def column(item: Experience, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(getattr(item, name))).double()


def picked(log_p: Tensor, item: Experience) -> Tensor:
    return log_p.gather(1, torch.from_numpy(item.answer).long()[:, None])[:, 0]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        largest = max(1.0, float(right[name].abs().max()))
        assert float((gradient - right[name]).abs().max()) <= 2e-6 * largest, name


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_log_probabilities_and_entropies_are_those_of_transformers_logits(temperature: float, fast: bool) -> None:
    model, objective = digit_model(layers=2), PolicyObjective(PolicyLoss(), temperature)
    policy: Any = objective.module(model)
    chunk = experiences()
    with torch.no_grad():
        all_log_p = [full_log_p(model, item, temperature) for item in chunk]
        with ExitStack() as stack:
            if fast:  # padding is left out then
                stack.enter_context(accelerate(policy, CPU, torch.float32))
            log_probs, entropies = policy.log_probs(collate_answers(pairs(chunk)))
    expected = torch.cat([picked(log_p, item) for log_p, item in zip(all_log_p, chunk, strict=True)])
    assert (log_probs - expected).abs().max() <= 1e-6
    expected = torch.cat([-(log_p.exp() * log_p).sum(-1) for log_p in all_log_p])
    assert (entropies - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_the_policys_loss_and_gradient_are_those_of_the_clipped_objective(entropy_weight: float) -> None:
    temperature, clip, scale = 1.3, 0.2, 0.25
    config = PolicyLoss(clip=clip, entropy_weight=entropy_weight)
    model, chunk = digit_model(layers=2), experiences()
    expected = torch.zeros((), dtype=torch.float64)
    num_clipped = 0
    for item in chunk:
        log_p = full_log_p(model, item, temperature)
        ratios = (picked(log_p, item) - column(item, "log_probs")).exp()
        advantages = column(item, "advantages")
        one, other = ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages
        num_clipped += int((other < one).sum())
        expected = expected - torch.minimum(one, other).sum() + entropy_weight * (log_p.exp() * log_p).sum()
    (scale * expected).backward()
    wanted = gradients(model)
    policy: Any = PolicyObjective(config, temperature).module(model)
    loss = policy(collate_experiences(chunk, Whitening()), scale)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(scale * float(expected.detach()), abs=1e-6)
    assert_close(gradients(model), wanted)
    assert 0 < num_clipped < sum(length for _, length in LENGTHS)
    assert policy.figures.take()["clipped"] == num_clipped


@pytest.mark.parametrize("clip", [0.2, None])
def test_the_critics_loss_and_gradient_are_those_of_values_in_front_of_each_token(clip: float | None) -> None:
    model, chunk = make_reward_model(digit_model(layers=2), seed=3), experiences()
    decoder = model.model
    expected = torch.zeros((), dtype=torch.float64)
    for item in chunk:
        states = full_states(decoder, item, lambda output: output.last_hidden_state)
        values = (states @ model.score.weight.T)[:, 0].double()
        old, returns = column(item, "values"), column(item, "returns")
        errors = (values - returns) ** 2
        if clip is not None:
            errors = torch.maximum(errors, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
        expected = expected + 0.5 * errors.sum()
    expected.backward()
    wanted = gradients(model)
    critic: Any = CriticObjective(clip).module(model)
    loss = critic(collate_experiences(chunk, Whitening()), 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_close(gradients(model), wanted)


def test_a_value_depends_on_the_tokens_in_front_of_its_place_and_on_no_other() -> None:
    critic: Any = CriticObjective(None).module(make_reward_model(digit_model(layers=2), seed=3))
    prompt, answer = np.array([1, 5], np.int32), np.array([4, 6, 7], np.int32)
    changed = np.array([4, 9, 7], np.int32)
    with torch.no_grad():
        before, after = (critic.values(collate_answers([(prompt, ids)])) for ids in (answer, changed))
    assert torch.equal(before[:2], after[:2])  # in front of tokens 4 and 6
    assert before[2] != after[2]


def test_text_adds_its_weight_times_the_gradient_of_its_mean_loss() -> None:
    model, chunk, weight = digit_model(layers=2), experiences(), 27.8
    objective = PolicyObjective(PolicyLoss(), 1.0)
    policy: Any = objective.module(model)
    tokens = np.random.default_rng(4).integers(0, 13, 12).astype(np.int32)
    labels = np.append(tokens[1:], IGNORE).astype(np.int32)
    policy(collate_experiences(chunk, Whitening()), 1.0).backward()
    alone = gradients(model)
    ids = torch.from_numpy(tokens).long()[None]
    model(input_ids=ids, labels=ids).loss.backward()  # transformers' own mean over the 11 targets
    text = gradients(model)
    policy(collate_experiences(chunk, Whitening()), 1.0).backward()
    policy(objective.collate([Row(tokens, labels, (12,))]), weight / 11).backward()
    assert_close(gradients(model), {name: alone[name] + weight * text[name] for name in alone})


def test_a_rank_without_answers_reaches_every_weight_and_adds_nothing() -> None:
    for objective, model in (
        (PolicyObjective(PolicyLoss(), 1.0), digit_model()),
        (CriticObjective(0.2), make_reward_model(digit_model(), seed=3)),
    ):
        module: Any = objective.module(model)
        loss = module(collate_experiences([], Whitening()), 1.0)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert all(item.grad is not None and not item.grad.any() for item in model.parameters())


def test_whitening_makes_mean_0_and_deviation_1_of_the_whole_update() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.5, 1000).astype(np.float32)
    whitening = Whitening.of(len(values), float(values.sum()), float(np.square(values.astype(np.float64)).sum()))
    white = np.concatenate([whitening.apply(values[:300]), whitening.apply(values[300:])])
    assert white.mean() == pytest.approx(0.0, abs=1e-4)
    assert white.std() == pytest.approx(1.0, abs=1e-4)
    assert not Whitening.of(5, 10.0, 20.0).apply(np.full(5, 2.0, np.float32)).any()
