"""Layers whose adapters plain PEFT does not read back from their files get none, or are refused before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from stagecoach_api.artifacts import ModelCard
from stagecoach_api.training import LoraTraining, Trainable
from stagecoach_trainer.models.adapter_rehearsal import lost_adapter_weights
from stagecoach_trainer.models.load import Head, load_folder, own_tokenizer
from stagecoach_trainer.models.lora import add_adapter
from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.models.save import save_adapter
from stagecoach_trainer.models.shipping import SavedProbe
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.architectures import tiny
from tests.trainer.families import save_tiny
from tests.trainer.models.makers import make_model

SHARED = "base_model.model.model.layers.1.mlp.shared_experts.up_proj.lora_A.weight"


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, **settings)


def test_peft_loses_the_adapters_of_shared_experts_in_laguna() -> None:
    """Its names of the shared experts fit the pattern with which transformers 5 renames those of older files."""
    model = tiny("laguna")
    before, state = {name: item.clone() for name, item in model.state_dict().items()}, torch.random.get_rng_state()
    lost = lost_adapter_weights(model, lora(target_modules=["up_proj", "q_proj"]))
    assert lost == [SHARED, SHARED.replace("lora_A", "lora_B")]
    assert lost_adapter_weights(model, lora(target_modules=["q_proj"])) == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(item, before[name]) for name, item in model.state_dict().items())


def test_such_layers_are_left_out_of_all_linear_and_the_adapter_is_published(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "laguna")
    settings = Trainable(lora=LoraTraining.model_validate({"rank": 2, "experts": "adapt"}))
    trained = choose_trainable(load_folder(base), settings, range(0), seed=1)
    assert "not: mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj, mlp.shared_experts.down_proj" in str(
        trained.notes
    )
    with torch.no_grad():
        for name, item in trained.model.named_parameters():
            item.add_(0.1 if "lora_B" in name else 0.0)
    (tmp_path / "output").mkdir()
    tokenizer = own_tokenizer(base)
    save_adapter(trained.model, tokenizer, base, tmp_path / "output", ModelCard(adapter=True))
    SavedProbe.of(trained.model, tokenizer).prove(tmp_path / "output", base, Head.LANGUAGE_MODEL)


def test_such_layers_are_refused_if_the_stage_names_them() -> None:
    with pytest.raises(UserError, match=r"PEFT does not read 2 weights .* \(model.layers.1.mlp.shared_experts.up_proj"):
        add_adapter(tiny("laguna"), LoraTraining(targets=["q_proj", "up_proj"]), range(0), seed=1)


def test_an_adapter_that_has_such_layers_is_not_continued() -> None:
    adapted: Any = get_peft_model(tiny("laguna"), lora(target_modules=["up_proj"]))
    settings = Trainable(lora=LoraTraining.model_validate({"continueAdapter": True}))
    with pytest.raises(UserError, match="continueAdapter: PEFT does not read 2 weights of this adapter back"):
        choose_trainable(adapted, settings, range(0), seed=1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_adapters_of_every_kind_come_back(kind: str, settings: dict[str, Any]) -> None:
    model = tiny(kind, tie_word_embeddings=False) if kind == "llama" else tiny(kind)
    assert lost_adapter_weights(model, lora(**settings)) == []


def test_the_adapter_of_a_reward_model_comes_back_with_its_head() -> None:
    adapted = choose_trainable(make_reward_model(make_model(400), seed=3), Trainable(lora=LoraTraining()), range(0), 1)
    assert isinstance(adapted.model, PeftModel)
    config: Any = adapted.model.peft_config["default"]
    assert config.modules_to_save
    assert lost_adapter_weights(adapted.model.get_base_model(), config) == []
