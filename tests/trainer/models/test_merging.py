"""Merging an adapter: the outputs before and after are compared, and a merge that changes them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from stagecoach_api.references import Reference
from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.models.merging import TOLERANCES, merge_adapter
from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_context, make_model, make_tokenizer, outside
from tests.trainer.stages.makers import Workshop

QUERY = ["q_proj", "down_proj"]


def tiny(dtype: torch.dtype, tied: bool = False) -> Any:
    model: Any = make_model(100, tied=tied)
    return model.to(dtype)


def adapted(model: Any, size: float = 0.05, **settings: Any) -> Any:
    """Return the model with an adapter whose second matrices are random numbers of this size."""
    chosen: dict[str, Any] = {"target_modules": QUERY, "r": 4} | settings
    found = get_peft_model(model, LoraConfig(**chosen))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name, parameter in found.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # the matrices that begin as zeros
                nn.init.normal_(parameter, std=size)
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [97, 98]}},
    ],
    ids=lambda settings: ", ".join(settings) or "plain",
)
def test_every_form_of_adapter_is_merged_within_the_tolerance(settings: dict[str, Any], dtype: torch.dtype) -> None:
    merged = merge_adapter(adapted(tiny(dtype), **settings), "adapter", World())
    assert not isinstance(merged, PeftModel)


def test_a_reward_models_adapter_is_merged() -> None:
    model = adapted(make_reward_model(make_model(100), seed=1), task_type="SEQ_CLS")
    assert merge_adapter(model, "adapter", World()).score.weight.shape == (1, 32)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_matrices_is_not_merged(layer: str, dtype: torch.dtype) -> None:
    """peft#2018, peft#2972: the merge changed both, and the model that was evaluated was not the one trained."""
    model = adapted(tiny(dtype, tied=True), target_modules=[layer])
    with pytest.raises(UserError, match=r"adapter: merging the adapter changed the model: outputs of up to .* allowed"):
        merge_adapter(model, "adapter", World())


def test_a_merge_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(UserError, match="changed the model"):
        merge_adapter(adapted(make_model(100)), "adapter", World())


def test_an_infinite_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter: PEFT cannot merge the adapter: NaNs"):
        merge_adapter(adapted(make_model(100), size=float("inf")), "adapter", World())


# -- from stage to stage -----------------------------------------------------------------------------------------------

HELD_OUT = [{"uri": "texts", "name": "en"}]
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"trainable": {"lora": {"rank": 4}}},
    "lora and matrices": {"trainable": {"lora": {"rank": 4, "modulesToSave": ["embed_tokens", "lm_head"]}}},
    "resized": {"trainable": {"lora": {"rank": 4, "newRows": True}}, "tokenizer": {"uri": "larger"}},
    "new rows": {"trainable": {"embeddings": {"rows": "new"}}, "tokenizer": {"uri": "larger"}},
}


def evaluate(workshop: Workshop, model: str) -> float:
    """Return the loss on the held-out set, as an `evaluate` stage measures it."""
    from stagecoach_api.kinds.evaluate import EvaluateStage
    from stagecoach_trainer.stages.evaluate import run

    config = EvaluateStage.model_validate({"model": {"uri": model}, "heldOut": HELD_OUT, "precision": "fp32"})
    return run(config, workshop.context("evaluate", f"{model} evaluated")).metrics["heldOut.en.loss"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_at_the_end_of_training_is_that_of_the_artifact(tmp_path: Path, form: str, tied: bool) -> None:
    if tied and form == "lora and matrices":  # refused when the stage starts
        return
    workshop = Workshop(tmp_path, tied)
    outcome, _ = workshop.pretrain(heldOut={"sets": HELD_OUT}, **FORMS[form])
    assert evaluate(workshop, "pretrain") == pytest.approx(outcome.metrics["heldOut.en.loss"], rel=1e-6)


def test_the_loss_is_handed_on_through_a_chain_of_adapters(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    lora: dict[str, Any] = {"trainable": {"lora": {"rank": 2}}, "heldOut": {"sets": HELD_OUT}, "budget": {"steps": 2}}
    first, _ = workshop.pretrain("first", **lora)
    second, _ = workshop.pretrain("second", model={"uri": "first"}, **lora)
    assert second.metrics["heldOut.en.before.loss"] == pytest.approx(first.metrics["heldOut.en.loss"], rel=1e-6)
    assert evaluate(workshop, "second") == pytest.approx(second.metrics["heldOut.en.loss"], rel=1e-6)


def test_a_base_whose_vocabulary_is_larger_than_its_matrices_is_grown(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    make_tokenizer(extra=("龘", "靐")).save_pretrained(workshop.inputs["base"])
    _, output = workshop.pretrain(budget={"steps": 1}, trainable={"lora": {"rank": 2}})
    report = json.loads((output / "report.json").read_text())
    assert report["vocabulary"] == {"newRows": 2, "rows": 402, "tokens": 402}
    merged = load_model(make_context(tmp_path / "again"), outside(output)).model
    assert merged.get_input_embeddings().weight.shape[0] == 402


def test_surplus_rows_are_kept_told_and_taken_by_new_tokens(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    folder = workshop.inputs["base"]
    model = make_model(450)
    model.config.save_pretrained(folder)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    new: dict[str, Any] = {
        "trainable": {"embeddings": {"rows": "new"}},
        "tokenizer": {"uri": "larger"},
        "budget": {"steps": 1},
    }
    _, output = workshop.pretrain(**new)
    head = load_file(output / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head[402:], model.lm_head.weight[402:])
    assert torch.equal(head[:400], model.lm_head.weight[:400])
    report = json.loads((output / "report.json").read_text())
    assert report["vocabulary"] == {"newRows": 2, "rows": 450, "tokens": 402}
    assert "450 rows for the 402 ids" in report["warnings"][0]
    again = load_model(make_context(tmp_path / "again", inputs={"out": output}), Reference(uri="out"))
    assert again.card.old_rows == 400
