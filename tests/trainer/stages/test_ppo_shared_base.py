"""PPO under LoRA with a reward model that is an adapter over the policy's own base: one base serves all four models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_makers import make_context, make_tokenizer, outside, save_base

from stagecoach_api.artifacts import ModelCard, RewardCard
from stagecoach_api.references import Reference
from stagecoach_api.stages.ppo import PpoStage
from stagecoach_api.training import LoraTraining, Trainable
from stagecoach_trainer.models.load import load_folder
from stagecoach_trainer.models.reward import load_reward_model, make_reward_model
from stagecoach_trainer.models.save import save_adapter
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.ppo import loop
from stagecoach_trainer.ppo.setting import PpoJob
from stagecoach_trainer.ppo.sharing import memory_of
from stagecoach_trainer.stages.ppo import run
from stagecoach_trainer.text.templates import apply_template

CPU = torch.device("cpu")
CHAT = [(({"role": "user", "content": "a fox"},), "the dog sleeps"), (({"role": "user", "content": "next"},), "")]


def stage(**changes: Any) -> PpoStage:
    values: dict[str, Any] = {
        "model": {"uri": "base"},
        "template": {"name": "humanBot"},
        "data": [{"uri": "prompts"}],
        "rewards": [{"name": "helpful", "model": {"uri": "reward"}}],
        "trainable": {"lora": {"rank": 2}},
        "sequenceLength": 96,
        "batch": {"samples": 4, "microBatchRows": 2},
        "budget": {"steps": 2},
        "optimizer": {"learningRate": 1e-2},
        "rollout": {"maxNewTokens": 8, "batchRows": 4},
        "guards": {"minEndedShare": None},
        "precision": "fp32",
    }
    return PpoStage.model_validate(values | changes)


def save_adapted_reward(root: Path, base: Path) -> Path:
    """Write a reward model that is an adapter over `base` and says something."""
    tokenizer = make_tokenizer()
    apply_template(tokenizer, stage().template)
    lora = Trainable(lora=LoraTraining(rank=2))
    model = choose_trainable(make_reward_model(load_folder(base), seed=3), lora, range(0), seed=1).model
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    vocabulary, output = root / "vocabulary", root / "reward"
    tokenizer.save_pretrained(vocabulary)
    output.mkdir()
    save_adapter(
        model, tokenizer, vocabulary, output, ModelCard(adapter=True, base=outside(base), reward=RewardCard(bias=0.5))
    )
    return output


def test_an_adapter_left_on_its_base_gives_the_rewards_of_the_merged_one(tmp_path: Path) -> None:
    reward = save_adapted_reward(tmp_path, save_base(tmp_path / "base", make_tokenizer()))
    context = make_context(tmp_path / "run", "ppo", {"reward": reward})

    merged, left = (
        load_reward_model(context, Reference(uri="reward"), torch.float32, CPU, merge=merge).score_texts(CHAT, 2)
        for merge in (True, False)
    )

    assert left == pytest.approx(merged, abs=1e-5)
    assert left[0] != left[1]


def test_the_base_is_kept_once_and_the_critic_goes_on_with_the_reward_models_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"instruction": words, "output": "left out"}) for words in ("a fox", "the lazy dog")]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    reward = save_adapted_reward(tmp_path, base)
    context = make_context(tmp_path / "run", "ppo", {"base": base, "prompts": prompts, "reward": reward})
    jobs: list[PpoJob] = []
    train = loop.train_policy
    monkeypatch.setattr(loop, "train_policy", lambda job, context: jobs.append(job) or train(job, context))

    run(stage(), context)

    (job,) = jobs
    (asked,) = job.asked
    body = memory_of([load_folder(base).model])  # without its head
    together = memory_of([job.policy, job.critic, asked])
    apart = sum(memory_of([model]) for model in (job.policy, job.critic, asked))
    assert apart - together >= 2 * body
    frozen = {name: parameter for name, parameter in asked.named_parameters() if "lora" in name}
    trained = {name: parameter for name, parameter in job.critic.named_parameters() if "lora" in name}
    assert set(frozen) == set(trained)
    assert any(not torch.equal(frozen[name], trained[name]) for name in frozen)
