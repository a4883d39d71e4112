"""PPO under LoRA with a reward model that is an adapter over the policy's own base: one base serves all four models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stagecoach_api.references import Reference
from stagecoach_trainer.models.load import load_folder
from stagecoach_trainer.models.reward import load_reward_model
from stagecoach_trainer.ppo import loop
from stagecoach_trainer.ppo.job import PpoJob, PpoResult
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.stages.ppo import run
from tests.trainer.align.makers import rewards_of
from tests.trainer.models.makers import make_context, make_tokenizer, save_base
from tests.trainer.ppo.makers import adapter_stage, parameter_bytes, save_adapted_reward
from tests.trainer.ranks import report_of_two_ranks

CPU = torch.device("cpu")
CHAT = [(({"role": "user", "content": "a fox"},), "the dog sleeps"), (({"role": "user", "content": "next"},), "")]


def write_prompts(path: Path) -> Path:
    lines = [json.dumps({"instruction": words, "output": "left out"}) for words in ("a fox", "the lazy dog")]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_an_adapter_left_on_its_base_gives_the_rewards_of_the_merged_one(tmp_path: Path) -> None:
    reward = save_adapted_reward(tmp_path, save_base(tmp_path / "base", make_tokenizer()))
    context = make_context(tmp_path / "run", "ppo", {"reward": reward})

    merged, left = (
        rewards_of(load_reward_model(context, Reference(uri="reward"), torch.float32, CPU, merge=merge), CHAT)
        for merge in (True, False)
    )

    assert left == pytest.approx(merged, abs=1e-5)
    assert left[0] != left[1]


def test_the_base_is_stored_once_and_the_critic_continues_the_reward_models_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    reward = save_adapted_reward(tmp_path, base)
    context = make_context(tmp_path / "run", "ppo", {"base": base, "prompts": prompts, "reward": reward})
    jobs: list[PpoJob] = []
    saved: list[int] = []
    train = loop.train_policy

    def note_and_train(job: PpoJob, context: StageContext) -> PpoResult:
        jobs.append(job)
        # Now, because a saved policy has no weights left.
        models = [job.policy, job.critic, *job.inference_only]
        saved.append(sum(parameter_bytes([model]) for model in models) - parameter_bytes(models))
        return train(job, context)

    monkeypatch.setattr(loop, "train_policy", note_and_train)

    run(adapter_stage(), context)

    (job,) = jobs
    (reward_model,) = job.inference_only
    body = parameter_bytes([load_folder(base).model])  # without its head
    assert saved[0] >= 2 * body
    frozen = {name: parameter for name, parameter in reward_model.named_parameters() if "lora" in name}
    trained = {name: parameter for name, parameter in job.critic.named_parameters() if "lora" in name}
    assert set(frozen) == set(trained)
    assert any(not torch.equal(frozen[name], trained[name]) for name in frozen)


@pytest.mark.timeout(300)
def test_two_ranks_learn_the_same_with_sharded_models_as_with_whole_copies(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    write_prompts(tmp_path / "prompts")
    save_adapted_reward(tmp_path, base)
    report = report_of_two_ranks("tests.trainer.stages.ppo_adapter_ranks_worker", tmp_path, "0", "3")
    whole, shared = report["0"], report["3"]
    assert shared[0]["reward"] == pytest.approx(whole[0]["reward"], abs=1e-6)
    for found, expected in zip(shared, whole, strict=True):
        assert found == pytest.approx(expected, abs=2e-4)
