"""Starting points: models of other families than LLaMA, and changed positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig

from stagecoach_api.kinds.pretrain import RopeScaling, RopeScalingName
from stagecoach_trainer.loop.loop import prepare_network
from stagecoach_trainer.models.starting_point import position_change
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.loop.makers import training
from tests.trainer.models.makers import CONTEXT, FAMILIES, family_config, make_tokenizer, report_of, save_family
from tests.trainer.stages.makers import Workshop

NOT_PACKED = ("bloom", "opt")
"""BLOOM's ALiBi counts from the beginning of the row; OPT's mask is made without looking at the positions."""
TARGETS = {"gpt2": "c_attn", "opt": "q_proj", "bloom": "query_key_value", "gpt_neox": "dense", "qwen2": "q_proj"}


def make_config(family: str) -> PreTrainedConfig:
    return family_config(family, rows=len(make_tokenizer()))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def workshop(tmp_path: Path, family: str) -> Workshop:
    """A workshop whose base is a model of the family."""
    found = Workshop(tmp_path)
    found.inputs["base"] = save_family(tmp_path / family, family, make_tokenizer())
    return found


def test_a_model_of_another_family_learns_and_opens_in_transformers(workshop: Workshop, family: str) -> None:
    _, output = workshop.sft(packing=False, budget={"steps": 20})
    report = report_of(workshop.context("sft", "sft"))
    assert report["history"][-1]["loss"] < report["history"][0]["loss"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.model_type == family
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


def test_its_packed_samples_give_equal_results_or_are_rejected(workshop: Workshop, family: str) -> None:
    changes: dict[str, Any] = {"sequenceLength": CONTEXT, "batch": {"samples": 10}, "budget": {"steps": 3}}
    alone, _ = workshop.sft("alone", packing=False, **changes)
    if family in NOT_PACKED:
        with pytest.raises(UserError, match=r"packed samples see each other.*`packing: false`"):
            workshop.sft("packed", **changes)
        return
    packed, _ = workshop.sft("packed", **changes)
    assert packed.tokens == alone.tokens
    assert packed.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-5)


def test_held_out_texts_are_measured_independently_of_each_other(workshop: Workshop) -> None:
    held_out = {"sets": [{"uri": "texts", "name": "en"}]}
    outcome, _ = workshop.sft(packing=False, sequenceLength=CONTEXT, budget={"steps": 1}, heldOut=held_out)
    model = AutoModelForCausalLM.from_pretrained(workshop.inputs["base"]).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(workshop.inputs["base"])
    total, tokens = 0.0, 0
    for line in workshop.inputs["texts"].read_text(encoding="utf-8").splitlines():
        text = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
        if not text:  # Qwen2's class has no tokens for some scripts of this vocabulary
            continue
        ids = torch.tensor([[tokenizer.bos_token_id, *text]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert outcome.metrics["heldOut.en.before.loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_its_adapter_is_trained_and_merged(workshop: Workshop, family: str) -> None:
    workshop.sft("first", packing=False, trainable={"lora": {"targets": [TARGETS[family]], "rank": 2}})
    _, merged = workshop.sft("second", packing=False, model={"uri": "first"})
    assert (merged / "model.safetensors").is_file()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opt"}))
def test_the_attention_dropout_of_the_stage_replaces_that_of_the_model(family: str) -> None:
    model = AutoModelForCausalLM.from_config(make_config(family))
    prepare_network(model, training(attention_dropout=0.25))
    assert attention_dropouts(model) == {0.25}
    prepare_network(model, training())
    assert attention_dropouts(model) == {0.0}


def attention_dropouts(model: nn.Module) -> set[float]:
    held = [getattr(module, name, None) for module in model.modules() for name in ("attention_dropout", "attn_dropout")]
    return {item.p if isinstance(item, nn.Dropout) else float(item) for item in held if item is not None}


def test_attention_dropout_that_a_model_lacks_is_rejected() -> None:
    model = AutoModelForCausalLM.from_config(make_config("opt"))
    prepare_network(model, training())
    with pytest.raises(UserError, match=r"attentionDropout: OPTForCausalLM has no attention dropout; remove the field"):
        prepare_network(model, training(attention_dropout=0.25))


# -- positions ---------------------------------------------------------------------------------------------------------


def test_a_context_that_is_too_short_is_extended_if_positions_are_rotary() -> None:
    config = LlamaConfig(max_position_embeddings=128)
    position_change(500, theta=1e6)(config)
    assert config.rope_parameters is not None
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (500, 1e6)


def test_rows_beyond_the_context_are_a_warning_unless_the_stage_prepares_the_model() -> None:
    said: list[str] = []
    position_change(500, warn=said.append)(LlamaConfig(max_position_embeddings=128))
    assert [text.split(" (")[0] for text in said] == ["rows of 500 tokens are longer than the model's context of 128"]
    position_change(128, warn=said.append)(LlamaConfig(max_position_embeddings=128))
    position_change(500, theta=1e6, warn=said.append)(LlamaConfig(max_position_embeddings=128))
    scaling = RopeScaling(name=RopeScalingName.LINEAR, factor=4.0)
    position_change(500, scaling=scaling, warn=said.append)(LlamaConfig(max_position_embeddings=128))
    assert len(said) == 1


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_too_few_learned_positions_are_reported_with_their_number(family: str) -> None:
    config = make_config(family)
    position_change(CONTEXT)(config)
    assert config.max_position_embeddings == CONTEXT
    with pytest.raises(
        UserError, match=rf"sequenceLength: 257 tokens, but the {family} has .* for 256; set at most 256"
    ):
        position_change(CONTEXT + 1)(config)


def test_alibi_has_no_end() -> None:
    config = make_config("bloom")
    before = config.to_dict()
    position_change(1 << 20)(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "change",
    [{"theta": 1e6}, {"must_rotate": True}, {"scaling": RopeScaling(name=RopeScalingName.LINEAR, factor=2.0)}],
    ids=lambda it: str(it),
)
def test_rotary_settings_for_a_model_without_rotary_positions_are_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"ropeTheta, ropeScaling: bloom has no rotary positions; remove these fields"):
        position_change(64, **change)(make_config("bloom"))
