"""The parts of the alignment benches: the tasks can be learned, both sides have equal settings, goals are checked."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import __main__ as benches
from bench.alignment import domains, hindsight, ppo_speed, ppo_toy, preference_task, reward_model, rlhf_example
from bench.alignment import ppo_task as task
from bench.alignment.peer_environment import REQUIREMENTS
from bench.measuring import ROOT, Figure, Goal, side_by_side

SHARED = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors")


def pins(path: Path) -> dict[str, str]:
    """Return versions by package, without a local part such as `+cpu`; of several, the one for the oldest Python."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([a-z0-9-]+)==([0-9.]+)", line):
            found.setdefault(match[1], match[2])
    return found


def reward_of(model: torch.nn.Module, tokens: list[int]) -> float:
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([tokens])).last_hidden_state  # type: ignore[operator]
        return float(model.score(hidden[0, -1]))  # type: ignore[operator]


def test_both_sides_use_the_same_versions_of_shared_packages() -> None:
    ours, peer = pins(ROOT / "requirements.lock"), pins(REQUIREMENTS)

    assert peer["trl"] == "1.12.0"
    assert {name: peer[name] for name in SHARED} == {name: ours[name] for name in SHARED}


def test_the_reward_rises_with_the_share_of_preferred_tokens() -> None:
    model, prompt = task.make_reward().eval(), task.make_prompts()[0]
    answers = [[number * 2 + (number >= liked) for number in range(task.ANSWER)] for liked in (0, 12, task.ANSWER)]

    rewards = [reward_of(model, prompt + answer) for answer in answers]

    assert rewards[0] < rewards[1] < rewards[2]


def test_the_policy_nearly_always_answers_with_a_likely_token() -> None:
    policy, prompt = task.make_policy().eval(), task.make_prompts()[0]

    with torch.no_grad():
        p = torch.softmax(policy(input_ids=torch.tensor([prompt])).logits[0, -1], dim=-1)

    assert float(p[: task.LIKELY].sum()) > 0.9


def test_every_update_has_prompts_of_allowed_lengths() -> None:
    prompts = task.make_prompts()

    assert len(prompts) == task.SAMPLES * task.UPDATES
    assert {task.SHORTEST <= len(prompt) <= task.LONGEST for prompt in prompts} == {True}
    assert np.min(prompts[0]) >= task.LIKELY


def test_every_step_of_the_reward_model_has_all_its_pairs(tmp_path: Path) -> None:
    preference_task.make_task(tmp_path)

    steps = preference_task.read_steps(tmp_path)

    assert [len(step) for step in steps] == [preference_task.PAIRS] * preference_task.STEPS
    assert preference_task.tokens_of([([1, 2], [3])]) == 3


@pytest.mark.parametrize(("ours", "met"), [([1.0, 1.5, 9.0], True), ([0.5, 0.9, 1.1], False), ([2.0, 2.1, 2.2], False)])
def test_the_final_reward_must_be_within_the_range_of_the_peers_seeds(ours: list[float], met: bool) -> None:
    assert ppo_speed.within(ours, [1.0, 2.0, 1.7]).met is met


def test_the_final_reward_is_the_mean_of_the_last_updates() -> None:
    assert ppo_speed.final_reward({"rewards": [9.0] * 5 + [1.0, 3.0]}) == 2.0
    assert ppo_speed.samples_per_second({"seconds": [1.0, 2.0, 4.0]}) == task.SAMPLES / 2


# -- learning ----------------------------------------------------------------------------------------------------------


def goals(found: Sequence[Figure]) -> list[bool]:
    """Return, for each figure with a goal, whether it meets it."""
    return [figure.met for figure in found if figure.goal != "–"]


def test_every_named_bench_has_figures() -> None:
    for name in benches.BENCHES:
        package = "bench.alignment" if name in benches.ALIGNMENT else "bench"
        assert callable(importlib.import_module(f"{package}.{name}").figures)


def test_a_missed_goal_gives_a_non_zero_exit_code() -> None:
    met, missed = (Figure("it", "s", 1.0, None, None, "≤ 2", met) for met in (True, False))
    assert (benches.report([met]), benches.report([met, missed])) == (0, 1)


def test_a_strict_goal_is_not_met_by_its_limit() -> None:
    assert [Goal(">", 0.5).met_by(value) for value in (0.4, 0.5, 0.6)] == [False, False, True]


def test_results_of_parallel_jobs_are_in_order() -> None:
    assert side_by_side(abs, [-3, 2, -1]) == [3, 2, 1]


@pytest.mark.parametrize(("greedy", "met"), [([0.95] * 9 + [0.2], True), ([1.0] * 8 + [0.94] * 2, False)])
def test_nine_of_ten_seeds_must_reach_the_optimum_of_the_toy_task(greedy: list[float], met: bool) -> None:
    def trained(value: float) -> ppo_toy.ArmResult:
        return ppo_toy.ArmResult(value, sampled=0.5, kl=0.0, early=0.0, value_loss=0.0, seconds=1.0)

    found = {arm.name: [trained(0.1)] for arm in ppo_toy.VARIANTS} | {"seeds": [trained(value) for value in greedy]}
    found |= {ppo_toy.JUDGED[0].name: [trained(0.7)]}

    assert goals(ppo_toy.figures_of(found)) == [met, True, False]


def test_a_reward_model_must_beat_the_longer_answer_by_two_standard_errors() -> None:
    def found(*accuracies: float) -> list[bool]:
        folds = [{"accuracy": accuracy, "lengthBaseline": 0.6} for accuracy in accuracies]
        return goals(reward_model.figures_of({**reward_model.summary(folds), "folds": folds}))

    assert found(0.7, 0.7, 0.71) == [True]
    assert found(0.6, 0.6, 0.61) == [False]
    assert found(0.5, 0.5, 0.51) == [False]


def test_domains_agree_on_quality_and_disagree_on_taste() -> None:
    def ends(domain: str, kind: str) -> set[tuple[str, str]]:
        chance = random.Random(0)
        pairs = [domains.pair(chance, domain, kind) for _ in range(200)]
        return {(one["chosen"].split(" ", 3)[3], one["rejected"].split(" ", 3)[3]) for one in pairs}

    assert ends("sleep", "quality") == ends("jump", "quality")
    assert ends("sleep", "taste") == {(worse, better) for better, worse in ends("jump", "taste")}


def test_conditional_prompts_and_the_focal_loss_must_each_add_accuracy() -> None:
    tastes = {"joint, ranked": 0.5, "joint, focal": 0.5, "conditional, ranked": 0.9, "conditional, focal": 0.9}
    found = {arm: [{"quality": 1.0, "taste": taste}] for arm, taste in tastes.items()}
    assert goals(domains.figures_of(found)) == [True, True, False]


def test_hindsight_must_beat_imitating_all_answers() -> None:
    def trained(exact: float, if_bad: float, text_loss: float) -> list[hindsight.ArmResult]:
        return [hindsight.ArmResult(exact, if_bad, text_loss, hidden=0.0, tokens=1)]

    found = {arm.name: trained(0.0, 0.0, 1.0) for arm in hindsight.ARMS}
    found |= {hindsight.CHAIN.name: trained(0.8, 0.7, 6.0), hindsight.BEST.name: trained(0.2, 0.0, 9.0)}
    assert goals(hindsight.figures_of(found)) == [False, True, False, True, True]


def test_the_example_must_be_fast_and_both_branches_must_beat_their_start() -> None:
    found = {
        "seconds": 601.0,
        "heldOut.comparisons.accuracy": 0.9,
        "heldOut.comparisons.lengthBaseline": 0.4,
        "liked.winRate.ppo": 0.2,
        "liked.winRate.dpo": 0.5,
        "rules.winRate.ppo": 0.6,
        "rules.winRate.dpo": 0.3,
    }
    assert goals(rlhf_example.figures_of(found)) == [False, True, True, False, False, True]


def test_among_equally_frequent_characters_the_alphabet_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_model, "CHARACTERS", len(reward_model.TEMPLATE) + 3)
    found = reward_model.alphabet_of(["白白", "日山尽依", "bot"])
    assert "".join(character for character in found if ord(character) > 127) == "依尽白"
