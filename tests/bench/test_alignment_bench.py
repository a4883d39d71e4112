"""The alignment benches' own parts: the task has something to learn, the two sides have the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.alignment import ppo_speed, preference_task
from bench.alignment import ppo_task as task
from bench.alignment.peer_environment import REQUIREMENTS
from bench.measuring import ROOT

SHARED = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors")


def pins(path: Path) -> dict[str, str]:
    """Versions by package, a local part such as `+cpu` left out; of several the one for the oldest Python."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([a-z0-9-]+)==([0-9.]+)", line):
            found.setdefault(match[1], match[2])
    return found


def reward_of(model: torch.nn.Module, tokens: list[int]) -> float:
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([tokens])).last_hidden_state  # type: ignore[operator]
        return float(model.score(hidden[0, -1]))  # type: ignore[operator]


def test_the_peer_computes_with_the_versions_we_compute_with() -> None:
    ours, peer = pins(ROOT / "requirements.lock"), pins(REQUIREMENTS)

    assert peer["trl"] == "1.12.0"
    assert {name: peer[name] for name in SHARED} == {name: ours[name] for name in SHARED}


def test_the_reward_rises_with_the_share_of_liked_tokens() -> None:
    model, prompt = task.make_reward().eval(), task.make_prompts()[0]
    answers = [[number * 2 + (number >= liked) for number in range(task.ANSWER)] for liked in (0, 12, task.ANSWER)]

    rewards = [reward_of(model, prompt + answer) for answer in answers]

    assert rewards[0] < rewards[1] < rewards[2]


def test_the_policy_says_a_likely_token_nearly_always() -> None:
    policy, prompt = task.make_policy().eval(), task.make_prompts()[0]

    with torch.no_grad():
        p = torch.softmax(policy(input_ids=torch.tensor([prompt])).logits[0, -1], dim=-1)

    assert float(p[: task.LIKELY].sum()) > 0.9


def test_every_update_has_its_prompts_within_the_lengths() -> None:
    prompts = task.make_prompts()

    assert len(prompts) == task.SAMPLES * task.UPDATES
    assert {task.SHORTEST <= len(prompt) <= task.LONGEST for prompt in prompts} == {True}
    assert np.min(prompts[0]) >= task.LIKELY


def test_every_step_of_the_reward_model_has_its_pairs(tmp_path: Path) -> None:
    preference_task.make_task(tmp_path)

    steps = preference_task.read_steps(tmp_path)

    assert [len(step) for step in steps] == [preference_task.PAIRS] * preference_task.STEPS
    assert preference_task.tokens_of([([1, 2], [3])]) == 3


@pytest.mark.parametrize(("ours", "met"), [([1.0, 1.5, 9.0], True), ([0.5, 0.9, 1.1], False), ([2.0, 2.1, 2.2], False)])
def test_a_final_reward_is_held_against_the_spread_of_the_peers_seeds(ours: list[float], met: bool) -> None:
    assert ppo_speed.within(ours, [1.0, 2.0, 1.7]).met is met


def test_a_final_reward_is_that_of_the_last_updates() -> None:
    assert ppo_speed.final_reward({"rewards": [9.0] * 5 + [1.0, 3.0]}) == 2.0
    assert ppo_speed.samples_per_second({"seconds": [1.0, 2.0, 4.0]}) == task.SAMPLES / 2
