"""`sft` end to end, on a model of a few thousand parameters."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_tokenizer, save_base
from tests.trainer.stages.makers import Workshop, report_in
from tests.trainer.text.published import GEMMA


def test_the_trained_model_answers_in_plain_transformers_with_its_chat_template(workshop: Workshop) -> None:
    outcome, output = workshop.sft(
        template={"name": "vicuna", "system": "You are short."},
        budget={"steps": 25},
        heldOut={
            "sets": [
                {"uri": "talks", "name": "talks", "format": "alpaca", "maxSamples": 9},
                {"uri": "texts", "name": "en"},
            ]
        },
    )
    assert outcome.metrics["heldOut.talks.loss"] < outcome.metrics["heldOut.talks.before.loss"] - 1
    assert "heldOut.en.bitsPerCharacter" in outcome.metrics
    tokenizer: Any = AutoTokenizer.from_pretrained(output)
    model: Any = AutoModelForCausalLM.from_pretrained(output)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is 3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert "You are short." in tokenizer.decode(ids["input_ids"][0])
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith("the")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    counts = report_in(output)["data"]["talks"]
    assert counts["records"] == counts["samples"] == 40


def test_chatml_ends_with_its_own_marker_if_the_vocabulary_has_it(workshop: Workshop) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workshop.root / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(workshop.root / "markers")
    workshop.inputs["markers"] = workshop.root / "markers"
    _, output = workshop.sft(
        "marked", tokenizer={"uri": "markers"}, template={"name": "chatml"},
        trainable={"lora": {"targets": ["q_proj"], "newRows": True}},
    )  # fmt: skip
    saved = AutoTokenizer.from_pretrained(output)
    assert saved.eos_token == "<|im_end|>"  # noqa: S105
    assert saved.chat_template is not None
    assert report_in(output)["warnings"] == []
    card = json.loads((output / "stagecoach.json").read_text())
    assert card["newRows"] == "mean"
    _, spelled = workshop.sft("spelled", template={"name": "chatml"})
    assert "specialTokens" in report_in(spelled)["warnings"][0]


def test_a_model_keeps_its_own_template_and_stops_where_it_ends_an_answer(workshop: Workshop) -> None:
    """A base of Gemma's kind: its template ends a turn with another token than the vocabulary's end token."""
    tokenizer = make_tokenizer(special=("<start_of_turn>", "<end_of_turn>"))
    tokenizer.chat_template = GEMMA
    save_base(workshop.root / "own", tokenizer, seed=1)
    workshop.inputs["own"] = workshop.root / "own"
    _, output = workshop.sft("kept", model={"uri": "own"}, template=None, budget={"steps": 1})
    saved = AutoTokenizer.from_pretrained(output)
    assert saved.chat_template == GEMMA
    ends = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    assert set(saved.convert_ids_to_tokens(ends)) == {"</s>", "<end_of_turn>"}
    assert report_in(output)["data"]["talks"]["samples"] == 40
    with pytest.raises(UserError, match="template: the model's tokenizer has no chat template; name one of alpaca"):
        workshop.sft("none", template=None)


def test_packed_and_unpacked_training_give_equal_results(workshop: Workshop) -> None:
    changes: dict[str, Any] = {"batch": {"samples": 10}, "budget": {"steps": 4}}
    packed, _ = workshop.sft("packed", **changes)
    alone, _ = workshop.sft("alone", packing=False, **changes)
    assert packed.tokens == alone.tokens
    assert packed.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-5)


def test_sets_with_weights_an_adapter_and_its_continuation(workshop: Workshop) -> None:
    _, first = workshop.sft(
        "first",
        data=[
            {"uri": "talks", "name": "talks", "format": "alpaca", "weight": 3},
            {"uri": "texts", "name": "texts", "weight": 1},
        ],
        trainable={"lora": {"rank": 4}},
    )
    rows = report_in(first)["phases"][0]["rows"]
    assert set(rows) == {"talks", "texts"}
    _, second = workshop.sft("second", model={"uri": "first"}, trainable={"lora": {"continueAdapter": True}})
    config = json.loads((second / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["base_model_name_or_path"] == "./base"  # no path of this machine
    _, third = workshop.sft("third", model={"uri": "second"})
    assert (third / "model.safetensors").is_file()
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(third).lm_head.weight).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequenceLength": 32, "batch": {"tokens": 64}}, r"no sample to train on is left .*tooLong 40"),
        ({"sequenceLength": 32, "batch": {"tokens": 64}, "tooLong": "fail"}, r"talks:1: \d+ tokens do not fit"),
        ({"loss": {"roles": ["tool"]}}, "noLoss 40"),
        (
            {"template": {"name": "custom", "jinja": "{{ messages[0]['content'] }}"}},
            r"talks:1: turn 1 .* leaves out",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_is_rejected(workshop: Workshop, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        workshop.sft(**changes)


def test_more_dropped_samples_than_allowed_fail_the_stage(workshop: Workshop) -> None:
    records = json.loads(workshop.inputs["talks"].read_text())
    records[0]["output"] = "the fox " * 100
    records[1]["output"] = "the fox " * 100
    records[2]["output"] = "the fox " * 100
    workshop.inputs["talks"].write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"7\.5% of the samples.*`maxDroppedShare` 5\.0%.*tooLong 3"):
        workshop.sft()
    _, output = workshop.sft("allowed", maxDroppedShare=0.1)
    assert report_in(output)["data"]["talks"]["tooLong"] == 3


def test_tokenised_shards_are_built_once_and_reused(workshop: Workshop) -> None:
    from stagecoach_api.conversation import Loss, Template, TemplateName, TooLong
    from stagecoach_api.references import WeightedSource
    from stagecoach_trainer.samples import datasets as sources
    from stagecoach_trainer.samples.datasets import conversation_shard
    from stagecoach_trainer.text.templates import apply_template

    tokenizer = AutoTokenizer.from_pretrained(workshop.root / "base")
    apply_template(tokenizer, Template(name=TemplateName.ALPACA))
    context = workshop.context("sft", "shards")
    source = WeightedSource(uri="talks")

    def shard(length: int) -> tuple[int, int]:
        found = conversation_shard(context, source, tokenizer, Loss(), TooLong.DROP, length)
        folders = [path for path in (context.cache / "tokens").iterdir() if path.is_dir()]
        return found.num_tokens, len(folders)

    tokens, folders = shard(160)
    assert folders == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read_records", None)
        assert shard(160) == (tokens, 1)
    assert shard(200) == (tokens, 2)
