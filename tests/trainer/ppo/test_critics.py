"""The critic's initial weights, its initial values, and which of its weights are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from stagecoach_api.artifacts import ModelCard, RewardCard
from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_api.references import Reference
from stagecoach_trainer.kernels.answer_log_probs import collate_answers
from stagecoach_trainer.kernels.dropout import switch_off_dropout
from stagecoach_trainer.models.load import load_folder
from stagecoach_trainer.models.reward import load_reward_model, make_reward_model
from stagecoach_trainer.models.save import save_model
from stagecoach_trainer.ppo import loop
from stagecoach_trainer.ppo.job import PpoJob
from stagecoach_trainer.ppo.objectives import CriticObjective
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.scoring import encode_answered
from stagecoach_trainer.stages.ppo import run
from stagecoach_trainer.text.templates import apply_template
from tests.trainer.loop.makers import weights
from tests.trainer.models.makers import make_context, make_model, make_tokenizer, report_of, save_base
from tests.trainer.ppo.makers import HUMAN_BOT, adapter_stage, save_adapted_reward

BIAS = -3.5
SHORT = {"name": "short", "length": {"atMost": 12}}
JUDGE = {"name": "helpful", "model": {"uri": "reward"}}
CHAT = (({"role": "user", "content": "a fox"},), "the dog sleeps")


def stage(**changes: Any) -> PpoStage:
    values: dict[str, Any] = {"trainable": {"full": {}}, "rewards": [JUDGE], "budget": {"steps": 1}}
    return adapter_stage(**(values | changes))


def save_reward(root: Path, tokenizer: Any, seed: int = 3) -> Path:
    """Write a reward model with a bias over random weights of this vocabulary."""
    model = make_reward_model(make_model(len(tokenizer), seed), seed=seed)
    apply_template(tokenizer, HUMAN_BOT)
    vocabulary, folder = root / "vocabulary", root / "reward"
    tokenizer.save_pretrained(vocabulary)
    folder.mkdir(parents=True)
    save_model(model, tokenizer, vocabulary, folder, ModelCard(adapter=False, reward=RewardCard(bias=BIAS)))
    return folder


def here(root: Path, **inputs: Path) -> StageContext:
    prompts = root / "prompts.jsonl"
    root.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"instruction": words, "output": "left out"}) for words in ("a fox", "the lazy dog")]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    base = inputs.get("base") or save_base(root / "base", make_tokenizer())
    return make_context(root / "run", "ppo", {"base": base, "prompts": prompts} | inputs)


@pytest.fixture(name="jobs")
def note_jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PpoJob, dict[str, torch.Tensor]]]:
    """The jobs that are trained, each with the critic's weights at its beginning."""
    found: list[tuple[PpoJob, dict[str, torch.Tensor]]] = []
    train = loop.train_policy

    def note(job: PpoJob, context: StageContext) -> Any:
        found.append((job, weights(job.critic)))
        return train(job, context)

    monkeypatch.setattr(loop, "train_policy", note)
    return found


def changed(job: PpoJob, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the critic's parameters that changed."""
    return {name for name, tensor in weights(job.critic).items() if not torch.equal(tensor, before[name])}


# -- its initial values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_the_initial_critic_predicts_its_reward_models_rewards_including_the_bias(
    tmp_path: Path, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    reward = save_adapted_reward(tmp_path, base) if adapter else save_reward(tmp_path, make_tokenizer())
    context = here(tmp_path / "stage", base=base, reward=reward)
    judge = load_reward_model(context, Reference(uri="reward"), torch.float32, torch.device("cpu"))
    assert judge.bias != 0.0
    said: list[tuple[float, float]] = []

    def look(job: PpoJob, context: StageContext) -> Any:
        (ids,) = encode_answered(judge.tokenizer, [CHAT])
        critic: Any = CriticObjective(0.2, job.critic_bias).module(job.critic.eval())
        answer = np.append(ids[-2:], np.int32(0))  # its last token is never fed: the value before it is at the real end
        with torch.no_grad():
            values = critic(collate_answers([(ids[:-2], answer)]))
        said.append((float(values[-1]), judge.score_ids([ids], 1)[0]))
        raise UserError("seen")

    monkeypatch.setattr(loop, "train_policy", look)
    with pytest.raises(UserError, match="seen"):
        run(stage(trainable={"lora": {"rank": 2}} if adapter else {"full": {}}), context)
    ((value, rewarded),) = said
    assert value == pytest.approx(rewarded, abs=1e-5)


def test_the_loop_gives_the_critic_its_bias_and_a_resumed_stage_ends_the_same(tmp_path: Path) -> None:
    reward = save_reward(tmp_path, make_tokenizer())
    histories = []
    for name, bias in (("with", BIAS), ("without", 0.0)):
        card = json.loads((reward / "stagecoach.json").read_text())
        card["reward"]["bias"] = bias
        (reward / "stagecoach.json").write_text(json.dumps(card))
        context = here(tmp_path / name, reward=reward)
        run(stage(critic={"clip": None}, kl={"coefficient": 0.0}), context)
        histories.append(report_of(context)["history"][0])
    assert histories[0]["reward"] == pytest.approx(histories[1]["reward"] + BIAS, abs=1e-5)
    assert histories[0]["valueLoss"] == pytest.approx(histories[1]["valueLoss"], rel=1e-4)


# -- what it starts from -----------------------------------------------------------------------------------------------


def test_a_reward_model_of_another_vocabulary_judges_while_a_language_model_becomes_the_critic(
    tmp_path: Path, jobs: list[Any]
) -> None:
    reward = save_reward(tmp_path, make_tokenizer(extra=("piece", "other")))
    base = save_base(tmp_path / "base", make_tokenizer())
    other = save_base(tmp_path / "sft", make_tokenizer(), seed=5)
    context = here(tmp_path / "stage", base=base, reward=reward, sft=other)
    run(stage(critic={"model": {"uri": "sft"}}, budget={"steps": 2}), context)
    ((job, before),) = jobs
    body = load_folder(other).model.embed_tokens.weight
    assert torch.equal(before["model.embed_tokens.weight"], body)
    assert job.critic_bias == 0.0
    assert "score.weight" in changed(job, before)
    assert len(report_of(context)["history"]) == 2


def test_a_reward_model_that_cannot_become_the_critic_is_refused_with_the_way_out(tmp_path: Path) -> None:
    reward = save_reward(tmp_path, make_tokenizer(extra=("piece",)))
    found = r"rewards: the reward model has another vocabulary: .*such as 'piece'.*set `critic\.model` to a model with"
    with pytest.raises(UserError, match=found):
        run(stage(), here(tmp_path / "first", reward=reward))
    with pytest.raises(UserError, match=r"critic\.model: the reward model has another vocabulary"):
        run(stage(critic={"model": {"uri": "reward"}}), here(tmp_path / "second", reward=reward))
    foreign = save_base(tmp_path / "foreign", make_tokenizer(extra=("piece",)))
    with pytest.raises(UserError, match=r"critic\.model: it has another vocabulary"):
        run(stage(rewards=[SHORT], critic={"model": {"uri": "foreign"}}), here(tmp_path / "third", foreign=foreign))


# -- what of it learns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ({"embeddings": {"rows": "all"}}, {"score.weight", "model.embed_tokens.weight"}),
        ({"lora": {"rank": 2}}, None),
        ({"full": {}}, None),
    ],
)
@pytest.mark.parametrize("rewards", [[SHORT], [JUDGE]], ids=["a new head", "a reward model's head"])
def test_the_critics_head_is_always_trained(
    tmp_path: Path, jobs: list[Any], trainable: Any, expected: set[str] | None, rewards: Any
) -> None:
    context = here(tmp_path, reward=save_reward(tmp_path / "judge", make_tokenizer()))
    run(stage(trainable=trainable, rewards=rewards), context)
    ((job, before),) = jobs
    learnt = changed(job, before)
    assert any("score" in name for name in learnt)
    assert expected is None or learnt == expected


def grown(root: Path) -> Path:
    """A model the last three of whose rows are new."""
    tokenizer = make_tokenizer(extra=("one", "two", "three"))
    base = save_base(root, tokenizer)
    card = ModelCard(adapter=False, old_rows=len(tokenizer) - 3)
    (base / "stagecoach.json").write_text(card.model_dump_json(by_alias=True, exclude_none=True))
    return base


@pytest.mark.parametrize("rewards", [[SHORT], [JUDGE]], ids=["a new head", "a reward model's head"])
def test_with_the_new_rows_the_critic_learns_its_own_new_rows_and_its_head(
    tmp_path: Path, jobs: list[Any], rewards: Any
) -> None:
    tokenizer = make_tokenizer(extra=("one", "two", "three"))
    reward = save_reward(tmp_path / "judge", tokenizer)
    context = here(tmp_path, base=grown(tmp_path / "grown"), reward=reward)
    run(stage(trainable={"embeddings": {"rows": "new"}}, rewards=rewards, budget={"steps": 2}), context)
    ((job, before),) = jobs
    assert "score.weight" in changed(job, before)
    assert {name for name, parameter in job.critic.named_parameters() if parameter.requires_grad} == {
        "score.weight",
        "model.embed_tokens.trainable_tokens_delta",
    }


def test_of_a_model_without_new_rows_the_policy_is_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainable\.embeddings\.rows: new: the model has no new rows"):
        run(stage(trainable={"embeddings": {"rows": "new"}}, rewards=[SHORT]), here(tmp_path))


# -- dropout -----------------------------------------------------------------------------------------------------------


def save_phi(folder: Path) -> Path:
    """A Phi whose configuration, like GPT-2's, drops a tenth of what comes in and of what each layer adds."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        embd_pdrop=0.1,
        resid_pdrop=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    PhiForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_dropout_of_a_models_own_is_switched_off_so_that_the_first_ratio_is_one(tmp_path: Path) -> None:
    context = here(tmp_path, base=save_phi(tmp_path / "phi"))
    run(stage(rewards=[SHORT], batch={"samples": 4, "microBatchRows": 4}), context)
    report = report_of(context)
    assert report["history"][0]["updateKl"] == pytest.approx(0.0, abs=1e-9)
    assert report["history"][0]["clipped"] == 0.0
    policy, critic = (warning for warning in report["warnings"] if "dropout" in warning)
    figures = "(embd_pdrop 0.1, resid_pdrop 0.2)"
    assert f"the policy's dropout is switched off {figures}" in policy
    assert f"the critic's dropout is switched off {figures}" in critic


def test_without_dropout_there_is_nothing_to_tell(tmp_path: Path) -> None:
    context = here(tmp_path)
    run(stage(rewards=[SHORT]), context)
    assert not any("dropout" in warning for warning in report_of(context)["warnings"])


def test_without_dropout_training_computes_the_log_probabilities_of_inference(tmp_path: Path) -> None:
    model = load_folder(save_phi(tmp_path))
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(model.train()(tokens).logits, model.eval()(tokens).logits)
    switch_off_dropout(model)
    assert torch.equal(model.train()(tokens).logits, model.eval()(tokens).logits)
    assert switch_off_dropout(model) == {}
