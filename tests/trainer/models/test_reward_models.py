"""Reward models: made from a language model, scored as by transformers, saved, loaded, rejected."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagecoach_api.artifacts import ModelCard, RewardCard
from stagecoach_api.conversation import Template, TemplateName
from stagecoach_api.references import Reference
from stagecoach_api.training import LoraTraining, Trainable
from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.models.reward import RewardModel, load_reward_model, make_reward_model
from stagecoach_trainer.models.save import save_adapter, save_model
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.scoring import encode_answered, with_system
from stagecoach_trainer.text.templates import apply_template
from tests.trainer.align.makers import rewards_of
from tests.trainer.models.makers import make_context, make_model, make_tokenizer, outside, save_base

CPU = torch.device("cpu")
TALK = ({"role": "user", "content": "what is a dog"},)
OTHER = (
    {"role": "user", "content": "黄河入海流"},
    {"role": "assistant", "content": "the"},
    {"role": "user", "content": "x"},
)


def chatty_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    apply_template(tokenizer, Template(name=TemplateName.VICUNA))
    return tokenizer


def sequences(count: int, rows: int, seed: int = 0) -> list[np.ndarray]:
    """Return `count` sequences of 3 to 20 ids, none of them special."""
    generator = np.random.default_rng(seed)
    return [generator.integers(3, rows, size=generator.integers(3, 21)).astype(np.int32) for _ in range(count)]


def reward_model(tied: bool = False) -> RewardModel:
    tokenizer = chatty_tokenizer()
    model = make_reward_model(make_model(len(tokenizer), tied=tied), seed=3)
    return RewardModel(model.eval(), tokenizer, bias=0.25, domains={"poems": "Judge the poem."})


def saved(folder: Path, reward: RewardModel, card: ModelCard | None = None) -> Path:
    source, output = folder / "vocabulary", folder / "reward"
    output.mkdir(parents=True)
    reward.tokenizer.save_pretrained(source)
    reward_card = RewardCard(bias=reward.bias, domains=dict(reward.domains))
    save_model(reward.model, reward.tokenizer, source, output, card or ModelCard(adapter=False, reward=reward_card))
    return output


def load(root: Path, path: Path, dtype: torch.dtype = torch.float32) -> RewardModel:
    return load_reward_model(context_with(root, path), Reference(uri="reward"), dtype, CPU)


def context_with(root: Path, path: Path) -> StageContext:
    return make_context(root / "run", "ppo", {"reward": path})


# -- scores ------------------------------------------------------------------------------------------------------------


def test_rewards_equal_those_of_transformers_classifier() -> None:
    reward = reward_model()
    found = reward.score_ids(sequences(7, 300), batch_rows=3)
    with torch.no_grad():
        expected = [
            float(reward.model(input_ids=torch.from_numpy(ids).long()[None]).logits) + 0.25 for ids in sequences(7, 300)
        ]
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(set(found)) == 7


def test_a_reward_does_not_depend_on_the_rest_of_its_batch() -> None:
    reward = reward_model()
    alone = [reward.score_ids([ids], batch_rows=1)[0] for ids in sequences(6, 300)]
    assert reward.score_ids(sequences(6, 300), batch_rows=6) == pytest.approx(alone, abs=1e-6)


def test_a_new_head_is_a_function_of_the_seed_and_leaves_the_random_state_alone() -> None:
    causal = make_model(300)
    before = torch.get_rng_state()
    heads = [make_reward_model(causal, seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    wide = make_reward_model(make_model(300, hidden=1024), 1).score.weight
    assert float(wide.detach().std()) == pytest.approx(1 / math.sqrt(1025), rel=0.1)


def test_texts_are_rendered_by_the_chat_template_with_the_end_token() -> None:
    reward = reward_model()
    messages = [*OTHER, {"role": "assistant", "content": "the dog sleeps"}]
    ids = encode_answered(reward.tokenizer, [(OTHER, "the dog sleeps")])[0]
    assert ids.tolist() == reward.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids[-1] == reward.tokenizer.eos_token_id


def test_the_reward_depends_on_the_answer_and_on_the_domain() -> None:
    reward = reward_model()
    pair = [(TALK, "a dog is an animal"), (TALK, "")]
    plain, instructed = rewards_of(reward, pair, 2), rewards_of(reward, pair, 2, domain="poems")
    assert plain[0] != plain[1]
    assert all(a != b for a, b in zip(plain, instructed, strict=True))
    by_hand = [(with_system(TALK, "Judge the poem."), answer) for _, answer in pair]
    assert rewards_of(reward, by_hand, 2) == instructed


def test_the_system_prompt_of_the_domain_replaces_that_of_the_conversation() -> None:
    own = [{"role": "system", "content": "Be brief."}, *TALK]
    assert with_system(own, "Judge.") == [{"role": "system", "content": "Judge."}, *TALK]
    assert with_system(own, None) == own


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_and_loaded_model_gives_the_same_rewards(tmp_path: Path, tied: bool) -> None:
    reward = reward_model(tied)
    loaded = load(tmp_path, saved(tmp_path, reward))
    pair = [(TALK, "a dog is an animal"), (OTHER, "月光")]
    assert rewards_of(loaded, pair, 2, "poems") == rewards_of(reward, pair, 2, "poems")
    assert (loaded.bias, dict(loaded.domains)) == (0.25, {"poems": "Judge the poem."})


def test_transformers_agrees_on_a_padded_batch_except_for_the_bias(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    reward = reward_model()
    path = saved(tmp_path, reward)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert type(model).__name__ == "LlamaForSequenceClassification"
    ids = [np.append(item, reward.tokenizer.eos_token_id) for item in sequences(5, 300)]
    width = max(len(item) for item in ids)
    padded = torch.full((5, width), model.config.pad_token_id)
    for row, item in zip(padded, ids, strict=True):
        row[: len(item)] = torch.from_numpy(item)
    with torch.no_grad():
        logits = model(input_ids=padded).logits[:, 0] + 0.25
    assert reward.score_ids([item.astype(np.int32) for item in ids], 5) == pytest.approx(logits.tolist(), abs=1e-6)


def test_an_adapter_with_its_head_is_merged_into_its_base(tmp_path: Path) -> None:
    tokenizer = chatty_tokenizer()
    base = save_base(tmp_path / "base", tokenizer)
    context = make_context(tmp_path / "training", "rewardModel", {"base": base})
    model = make_reward_model(load_model(context, Reference(uri="base")).model, seed=5)
    trained = choose_trainable(model, Trainable(lora=LoraTraining(targets=("q_proj",), rank=2)), range(0), 5)
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    trained_names = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    assert sum("score" in name for name in trained_names) == 1
    output = tmp_path / "adapter"
    output.mkdir()
    card = ModelCard(adapter=True, base=outside(base), reward=RewardCard(bias=1.5))
    save_adapter(trained.model, tokenizer, base, output, card)
    loaded = load(tmp_path, output)
    expected = RewardModel(trained.model.get_base_model().eval(), tokenizer, bias=1.5)
    assert loaded.score_ids(sequences(4, 300), 4) == pytest.approx(expected.score_ids(sequences(4, 300), 4), abs=1e-5)


def test_in_bf16_the_head_stays_in_fp32(tmp_path: Path) -> None:
    reward = reward_model()
    loaded = load(tmp_path, saved(tmp_path, reward), torch.bfloat16)
    assert loaded.model.score.weight.dtype is torch.float32
    assert loaded.model.model.layers[0].self_attn.q_proj.weight.dtype is torch.bfloat16
    assert loaded.score_ids(sequences(4, 300), 4) == pytest.approx(reward.score_ids(sequences(4, 300), 4), abs=0.05)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_language_model_is_not_a_reward_model(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", chatty_tokenizer())
    with pytest.raises(UserError, match=r"LlamaForCausalLM|a model without `architectures`"):
        load(tmp_path, base)


def test_a_reward_model_is_not_a_language_model(tmp_path: Path) -> None:
    context = context_with(tmp_path, saved(tmp_path, reward_model()))
    with pytest.raises(UserError, match="reward model, which scores answers"):
        load_model(context, Reference(uri="reward"))


def test_two_labels_are_rejected(tmp_path: Path) -> None:
    reward = reward_model()
    reward.model.config.num_labels = 2
    reward.model.score = torch.nn.Linear(32, 2, bias=False)
    path = saved(tmp_path, reward, ModelCard(adapter=False))
    with pytest.raises(UserError, match="classifier of 2 labels"):
        load(tmp_path, path)


def test_a_folder_without_vocabulary_is_rejected(tmp_path: Path) -> None:
    path = saved(tmp_path, reward_model())
    for name in ("tokenizer.json", "tokenizer.model"):
        (path / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no vocabulary"):
        load(tmp_path, path)


def test_a_vocabulary_without_chat_template_is_rejected(tmp_path: Path) -> None:
    path = saved(tmp_path, reward_model())
    (path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load(tmp_path, path)


def test_the_adapter_of_a_language_model_is_rejected(tmp_path: Path) -> None:
    tokenizer = chatty_tokenizer()
    base = save_base(tmp_path / "base", tokenizer)
    context = make_context(tmp_path / "training", "sft", {"base": base})
    loaded = load_model(context, Reference(uri="base"))
    trained = choose_trainable(loaded.model, Trainable(lora=LoraTraining(targets=("q_proj",), rank=2)), range(0), 5)
    output = tmp_path / "adapter"
    output.mkdir()
    with torch.no_grad():
        next(parameter for name, parameter in trained.model.named_parameters() if "lora_B" in name).add_(1.0)
    save_adapter(trained.model, tokenizer, base, output, ModelCard(adapter=True, base=outside(base)))
    with pytest.raises(UserError, match="adapter of a language model"):
        load(tmp_path, output)


def test_tokens_of_another_vocabulary_are_rejected() -> None:
    reward = reward_model()
    with pytest.raises(UserError, match="its vocabulary is another one"):
        reward.score_ids([np.array([5, 100_000], np.int32)], 1)
    with pytest.raises(UserError, match="no tokens"):
        reward.score_ids([np.array([], np.int32)], 1)


def test_an_unknown_domain_is_rejected_by_name() -> None:
    with pytest.raises(UserError, match=r"no domain 'songs'; its domains are: poems"):
        rewards_of(reward_model(), [(TALK, "x")], 1, domain="songs")


def test_an_answer_without_a_prompt_is_rejected() -> None:
    with pytest.raises(UserError, match="the answer has no prompt"):
        rewards_of(reward_model(), [((), "x")], 1)
