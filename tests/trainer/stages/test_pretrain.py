"""`pretrain` end to end, on a model of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_context, make_tokenizer, outside
from tests.trainer.stages.makers import Workshop, report_in, write_texts

SHAPE = {"hiddenSize": 32, "intermediateSize": 48, "numLayers": 1, "numHeads": 4, "maxPositionEmbeddings": 64}


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_a_new_model_learns_and_equal_runs_write_equal_files(workshop: Workshop) -> None:
    changes: dict[str, Any] = {
        "model": None,
        "architecture": SHAPE,
        "tokenizer": {"uri": "base"},
        "heldOut": {"sets": [{"uri": "texts", "name": "en"}], "maxTokens": 300},
        "budget": {"steps": 12},
    }
    outcome, output = workshop.pretrain("one", **changes)
    _, again = workshop.pretrain("two", **changes)
    metrics = outcome.metrics
    assert metrics["heldOut.en.bitsPerCharacter"] < metrics["heldOut.en.before.bitsPerCharacter"] - 0.3
    assert outcome.tokens > 12 * 100
    assert files_of(output) == files_of(again)
    assert {"config.json", "model.safetensors", "tokenizer.json", "stagecoach.json", "report.json", "report.md"} <= set(
        files_of(output)
    )
    report = report_in(output)
    assert report["steps"] == 12
    assert report["data"]["texts"]["records"] == report["data"]["texts"]["samples"] == 40
    assert report["metrics"]["packing.usefulShare"] > 0.8
    assert report["phases"][0]["rowsPerStep"] == 4
    assert report["parameters"]["trained"] == report["parameters"]["all"]
    assert not any(str(workshop.root).encode() in content for content in files_of(output).values())


def test_new_rows_then_an_adapter_over_them_then_a_continued_adapter(workshop: Workshop) -> None:
    """The chain of Chinese-LLaMA: grow, train new rows, train an adapter and new rows, continue the adapter."""
    base = load_file(workshop.root / "base" / "model.safetensors")
    grown = {
        "precision": "bf16",
        "tokenizer": {"uri": "larger"},
        "trainable": {"embeddings": {"rows": "new"}},
        "optimizer": {"learningRate": 0.01, "weightDecay": 0.5},
    }
    write_texts(workshop.inputs["texts"])
    with workshop.inputs["texts"].open("a") as file:
        file.writelines(json.dumps({"text": "龘靐" * 9}, ensure_ascii=False) + "\n" for _ in range(20))
    _, rows_output = workshop.pretrain("rows", **grown)
    rows = load_file(rows_output / "model.safetensors")
    for name, tensor in base.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(rows[name][: len(tensor)], tensor)
            assert len(rows[name]) == len(tensor) + 2
        else:
            assert torch.equal(rows[name], tensor)
    assert json.loads((rows_output / "stagecoach.json").read_text()) == {"adapter": False, "oldRows": 400}

    _, first_output = workshop.pretrain("first", model={"uri": "rows"}, trainable={"lora": {"newRows": True}})
    first = load_model(make_context(workshop.root / "look"), outside(first_output))
    embedding = first.model.get_input_embeddings().weight
    assert torch.equal(embedding[:400], base["model.embed_tokens.weight"])
    assert not torch.equal(embedding[400:], rows["model.embed_tokens.weight"][400:])
    assert not torch.equal(
        first.model.state_dict()["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"]
    )

    _, second_output = workshop.pretrain(
        "second", model={"uri": "first"}, trainable={"lora": {"continueAdapter": True}}
    )
    cards = [json.loads((output / "stagecoach.json").read_text()) for output in (first_output, second_output)]
    assert cards[0] == cards[1]
    one, two = (load_file(output / "adapter_model.safetensors") for output in (first_output, second_output))
    assert one.keys() == two.keys()
    assert not all(torch.equal(one[name], two[name]) for name in one)

    _, third_output = workshop.pretrain("third", model={"uri": "second"}, trainable={"lora": {"targets": ["q_proj"]}})
    third = load_model(make_context(workshop.root / "look"), outside(third_output))
    assert third.card.base is not None
    assert third.card.base.uri == str(second_output)
    assert third.card.old_rows == 400
    assert third.model.get_input_embeddings().weight.shape[0] == 402


def test_phases_and_positions_reach_the_saved_model(workshop: Workshop) -> None:
    _, output = workshop.pretrain(
        data=[{"uri": "texts", "name": "a"}],
        phases=[
            {"name": "short", "tokens": 300},
            {"name": "long", "tokens": 600, "sequenceLength": 300, "batchTokens": 600, "ropeTheta": 50000},
        ],
        ropeScaling={"name": "linear", "factor": 2},
    )
    config = json.loads((output / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_parameters"]["rope_theta"] == 50000
    assert [phase["name"] for phase in report_in(output)["phases"]] == ["short", "long"]


def test_weights_and_replay_are_reported_by_set(workshop: Workshop) -> None:
    workshop.inputs["more"] = write_texts(workshop.root / "more.jsonl", 10)
    _, output = workshop.pretrain(
        data=[{"uri": "texts", "name": "new", "weight": 9}, {"uri": "more", "name": "replay", "weight": 1}]
    )
    rows = report_in(output)["phases"][0]["rows"]
    assert rows["replay"] in (2, 3)
    assert rows["new"] + rows["replay"] == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"uri": "texts"}, {"uri": "texts"}]}, "give each a unique `name`"),
        ({"data": [{"uri": "talks"}]}, "a conversation where plain text"),
        ({"data": [{"uri": "empty"}]}, "no sample"),
        ({"tokenizer": {"uri": "smaller"}}, "never shrunk|missing"),
        ({"earlyStop": {"set": "zh"}}, "'zh' is not in `heldOut.sets`"),
        ({"trainable": {"lora": {}}, "ropeTheta": 5e4}, "adapter has no model configuration"),
        ({"trainable": {"lora": {"targets": ["wq"]}}}, "q_proj"),
        ({"trainable": {"embeddings": {}}}, "no new rows"),
        (
            {"model": None, "architecture": SHAPE, "tokenizer": {"uri": "base"}, "trainable": {"lora": {}}},
            "an adapter needs a `model`",
        ),
        (
            {"model": None, "architecture": SHAPE, "tokenizer": {"uri": "base"}, "sequenceLength": 128},
            "maxPositionEmbeddings",
        ),
    ],
)
def test_incompatible_settings_are_rejected(workshop: Workshop, changes: dict[str, Any], message: str) -> None:
    (workshop.root / "empty.jsonl").write_text("")
    workshop.inputs["empty"] = workshop.root / "empty.jsonl"
    make_tokenizer(300).save_pretrained(workshop.root / "smaller")
    workshop.inputs["smaller"] = workshop.root / "smaller"
    with pytest.raises(UserError, match=message):
        workshop.pretrain(**changes)


def test_too_many_empty_documents_fail_the_stage_with_their_number(workshop: Workshop) -> None:
    path = workshop.inputs["texts"]
    path.write_text("".join(json.dumps({"text": "the fox" if number % 2 else ""}) + "\n" for number in range(20)))
    with pytest.raises(UserError, match=r"50\.0% of the samples.*emptyText 10"):
        workshop.pretrain()
