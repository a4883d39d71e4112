"""The content of a pool, against plain transformers and sums written out here, without the trainer's code."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.ppo.experience import Experience
from stagecoach_trainer.ppo.loop import train_policy
from stagecoach_trainer.ppo.rollout import Rollouts
from tests.trainer.loop.makers import context
from tests.trainer.ppo.makers import (
    END,
    FIRST_DIGIT,
    FunctionTerm,
    configuration,
    digit_model,
    echoes,
    ppo_job,
    reward_of,
)

Array = npt.NDArray[np.float64]

SAMPLES, UPDATES = 16, 3
PRICE, TARGET, HORIZON = 0.3, 0.05, 100
GAMMA, LAMBDA = 0.9, 0.7
TEMPERATURE, WEIGHT, NO_END, BIAS = 0.8, 1.5, -0.6, 0.75
SETTINGS: dict[str, Any] = {
    "batch": {"samples": SAMPLES, "microBatchRows": 3},
    "budget": {"steps": UPDATES},
    "rollout": {"maxNewTokens": 5, "batchRows": 6, "temperature": TEMPERATURE, "missingEndReward": NO_END},
    "policy": {"innerEpochs": 2, "miniBatchSamples": 8, "gamma": GAMMA, "gaeLambda": LAMBDA},
    "kl": {"coefficient": PRICE, "target": TARGET, "horizon": HORIZON},
    "guards": {
        "minKl": None,
        "minEntropy": None,
        "minEndedShare": None,
        "maxLengthFactor": None,
        "minLengthFactor": None,
    },
}


@dataclass(frozen=True)
class Made:
    """The pool of one update, and the weights it was made with."""

    pool: list[Experience]
    policy: Any
    critic: Any


@pytest.fixture(name="updates", scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Made], Any]:
    """The updates of a small run, and its reference."""
    reward = reward_of(("only", FunctionTerm(echoes), WEIGHT))
    reference = digit_model(seed=5)
    job = replace(
        ppo_job(configuration(**SETTINGS), reward),
        reference=copy.deepcopy(reference),
        critic=make_reward_model(digit_model(seed=3), seed=4),
        critic_bias=BIAS,
    )
    found: list[Made] = []
    fill = Rollouts.fill

    def note(self: Rollouts, pool: Any, *others: Any) -> Any:
        rollouts = fill(self, pool, *others)
        found.append(Made(list(pool), copy.deepcopy(job.policy).eval(), copy.deepcopy(job.critic).eval()))
        return rollouts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "fill", note)
        train_policy(job, context(tmp_path_factory.mktemp("run")))
    return found, reference.eval()


# -- written out -------------------------------------------------------------------------------------------------------


def log_probs(model: Any, item: Experience) -> Array:
    """Log-probability of each token of the answer, from the logits of all positions and all tokens."""
    ids = torch.tensor([[*item.prompt.tolist(), *item.answer.tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double() / TEMPERATURE
    table = torch.log_softmax(logits, -1).numpy()
    first = len(item.prompt)
    return np.array([table[first + place - 1, token] for place, token in enumerate(item.answer.tolist())])


def values(model: Any, item: Experience) -> Array:
    """Value before each token of the answer: the head on the last state of the tokens so far."""
    found = []
    for place in range(len(item.answer)):
        ids = torch.tensor([[*item.prompt.tolist(), *item.answer[:place].tolist()]])
        with torch.no_grad():
            state = model.model(input_ids=ids).last_hidden_state[0, -1].double().numpy()
        found.append(float(state @ model.score.weight.detach().double().numpy()[0]) + BIAS)
    return np.array(found)


def score(item: Experience) -> float:
    if item.answer[-1] != END:
        return NO_END
    digits = [token for token in item.answer.tolist() if token >= FIRST_DIGIT]
    right = [token for token in digits[:4] if token == item.prompt[-1]]
    return WEIGHT * len(right) / 4


def advantages(rewards: Array, expected: Array) -> Array:
    """The sum of arXiv 1506.02438, equation 16, term by term."""
    after = [*expected[1:], 0.0]
    surprises = [reward + GAMMA * later - now for reward, later, now in zip(rewards, after, expected, strict=True)]
    return np.array(
        [
            sum((GAMMA * LAMBDA) ** (later - place) * surprises[later] for later in range(place, len(surprises)))
            for place in range(len(surprises))
        ]
    )


def kl_per_answer(made: Made, reference: Any) -> float:
    sums = [float((log_probs(made.policy, item) - log_probs(reference, item)).sum()) for item in made.pool]
    return sum(sums) / len(sums)


def price_after(price: float, kl: float) -> float:
    """arXiv 1909.08593, section 2.2."""
    return price * (1.0 + float(np.clip(kl / TARGET - 1.0, -0.2, 0.2)) * SAMPLES / HORIZON)


# -- compared ----------------------------------------------------------------------------------------------------------


def assert_pool(made: Made, reference: Any, price: float) -> None:
    for item in made.pool:
        spoken, expected = log_probs(made.policy, item), values(made.critic, item)
        rewards = -price * (spoken - log_probs(reference, item))
        rewards[-1] += score(item)
        better = advantages(rewards, expected)
        for name, wanted in (
            ("log_probs", spoken), ("values", expected), ("advantages", better), ("returns", better + expected),
        ):  # fmt: skip
            np.testing.assert_allclose(getattr(item, name), wanted, atol=1e-5, rtol=0, err_msg=name)


def test_the_first_pool_is_what_full_logits_and_written_out_sums_say(updates: tuple[list[Made], Any]) -> None:
    made, reference = updates
    assert len(made[0].pool) == SAMPLES
    assert {item.answer[-1] == END for item in made[0].pool} == {True, False}
    assert len({len(item.answer) for item in made[0].pool}) > 2
    assert kl_per_answer(made[0], reference) > 0.5
    assert_pool(made[0], reference, PRICE)


def test_the_next_pools_are_made_at_the_price_that_the_kl_before_them_left(updates: tuple[list[Made], Any]) -> None:
    made, reference = updates
    price = PRICE
    for before, after in pairwise(made):
        price = price_after(price, kl_per_answer(before, reference))
        assert_pool(after, reference, price)
    assert len(made) == UPDATES
    assert price > PRICE * 1.05
