"""Adapters: on which layers, decided by the model itself; which share they reach; and that they can be merged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from stagecoach_api.training import Experts, LoraTraining, Trainable
from stagecoach_trainer.models.lora import add_adapter
from stagecoach_trainer.models.merging import merge_adapter
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.architectures import tiny
from tests.trainer.models.makers import make_model, make_tokenizer
from tests.trainer.models.test_merging import HELD_OUT, evaluate
from tests.trainer.stages.makers import Workshop

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NO_ROWS = range(0)


def adapt(model: Any, **settings: Any) -> tuple[Any, tuple[str, ...]]:
    return add_adapter(model, LoraTraining(**{"rank": 2} | settings), NO_ROWS, seed=1)


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "opt", "falcon", "glm4", "mixtral", "mamba", "llama4_text"])
def test_by_default_every_family_gets_adapters_that_can_be_merged(kind: str) -> None:
    model = tiny(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted, _ = adapt(model, experts=Experts.ADAPT if kind in ("mixtral", "llama4_text") else None)
    plain = {name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(plain[name], weight) for name, weight in before.items() if name in plain)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    merge_adapter(adapted, kind, World())


def test_the_default_of_a_llama_is_its_seven_layers_with_the_numbers_of_plain_peft() -> None:
    ours, notes = adapt(make_model(100))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=16, target_modules=list(LLAMA), task_type="CAUSAL_LM")
        theirs = get_peft_model(make_model(100), config)
    assert ours.peft_config["default"].target_modules == set(LLAMA)
    expected = theirs.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.state_dict().items())
    assert notes[0] == "adapters of rank 2 on " + ", ".join(
        f"{'mlp' if name in LLAMA[4:] else 'self_attn'}.{name}" if "." in name else name for name in LLAMA
    )


@pytest.mark.parametrize(
    ("settings", "reach"),
    [
        ({}, r"14 of 14 linear layers of the blocks, 99\.3% of the blocks' parameters$"),
        (
            {"targets": ("q_proj", "v_proj")},
            r"4 of 14 .* 16\.6% .*; not: self_attn\.k_proj, self_attn\.o_proj",
        ),
        ({"targets": ("all-linear", "lm_head")}, "14 of 14"),
        ({"modules_to_save": ("down_proj",)}, r"12 of 14 .*; not: mlp\.down_proj$"),
    ],
)
def test_the_notes_state_which_share_of_the_blocks_is_reached(settings: dict[str, Any], reach: str) -> None:
    _, notes = adapt(make_model(100), **settings)
    assert re.search(reach, notes[1]), notes[1]


def test_experts_must_be_adapted_or_frozen_by_name() -> None:
    with pytest.raises(UserError, match=r"mlp\.experts\.gate_up_proj, mlp\.experts\.down_proj\) .* hold 88% of"):
        adapt(tiny("mixtral"))
    _, notes = adapt(tiny("mixtral"), experts=Experts.FREEZE)
    assert "not: mlp.experts.gate_up_proj, mlp.experts.down_proj" in notes[1]
    _, notes = adapt(tiny("mixtral"), targets=("q_proj",))
    assert "2 of 8 linear layers" in notes[1]
    adapted, notes = adapt(tiny("mixtral"), experts=Experts.ADAPT)
    assert adapted.peft_config["default"].target_parameters == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert "not:" not in notes[1]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"experts": Experts.ADAPT}, "no fused experts; remove the field"),
        (
            "mixtral",
            {"experts": Experts.ADAPT, "dropout": 0.1},
            r"dropout: 0\.1, but adapters of fused experts have",
        ),
        ("dots1", {"targets": ("gate_proj",)}, r"PEFT reads gate_proj as the fused experts of Dots1ForCausalLM"),
        ("mamba", {"targets": ("dt_proj",)}, r"an adapter on mixer\.dt_proj cannot be merged again \(outputs of up to"),
    ],
)
def test_adapters_that_cannot_work_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt(tiny(kind), **settings)


def test_an_adapter_on_a_tied_head_is_refused_before_it_is_trained() -> None:
    """peft#2018, peft#2972: `sft` ended with a held-out loss of 16.64, and its artifact had one of 12.00."""
    message = r"targets: model\.embed_tokens and lm_head share one matrix, and an adapter changes lm_head alone"
    trainable = Trainable(lora=LoraTraining(targets=("q_proj", "lm_head")))
    with pytest.raises(UserError, match=message):
        choose_trainable(make_model(100, tied=True), trainable, NO_ROWS, seed=1)
    assert choose_trainable(make_model(100), trainable, NO_ROWS, seed=1).adapter


@pytest.mark.parametrize("kind", ["dots1", "deepseek_v2"])
def test_layers_with_the_earlier_names_of_experts_are_left_out(kind: str) -> None:
    """PEFT reads `gate_proj` of a dense layer as the fused experts: what was saved did not compute what was trained."""
    adapted, notes = adapt(tiny(kind), experts=Experts.ADAPT)
    assert adapted.peft_config["default"].rank_pattern == {}
    assert re.search(r"; not: .*gate_proj, .*up_proj, .*down_proj", notes[1])


def test_adapters_on_experts_are_saved_loaded_and_merged_exactly(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    config = MixtralConfig(
        vocab_size=len(make_tokenizer()), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(workshop.inputs["base"])
    lora = {"lora": {"rank": 2, "experts": "adapt"}}
    outcome, output = workshop.pretrain(trainable=lora, heldOut={"sets": HELD_OUT})
    assert "gate_up_proj" in str(json.loads((output / "adapter_config.json").read_text())["target_parameters"])
    assert evaluate(workshop, "pretrain") == pytest.approx(outcome.metrics["heldOut.en.loss"], rel=1e-6)
