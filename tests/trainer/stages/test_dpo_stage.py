"""The `dpo` stage: preferences in, a policy and its report out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stagecoach_api.kinds.dpo import DpoStage
from stagecoach_api.references import Reference
from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.stages import dpo
from stagecoach_trainer.stages.dpo import run
from tests.trainer.align.makers import LEARNS, preference_context, stop_and_resume, write_labels, write_pairs
from tests.trainer.models.makers import content_of, make_context, make_tokenizer, report_of, save_base

KTO = {"kto": {"beta": 0.5}}


# -- makers ------------------------------------------------------------------------------------------------------------


def stage(**changes: Any) -> DpoStage:
    return DpoStage.model_validate(LEARNS | {"budget": {"steps": 4}} | changes)


def context_for(root: Path, **inputs: Path) -> StageContext:
    return preference_context(root, "dpo", (24, 8), **inputs)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "start", "steps", "least"),
    [({"sigmoid": {}}, math.log(2), 4, 0.9), ({"ipo": {"beta": 0.5}}, 1.0, 4, 0.9), (KTO, 0.5, 12, 0.7)],
    ids=["sigmoid", "ipo", "kto"],
)
def test_training_separates_the_pairs_from_a_start_without_opinion(
    tmp_path: Path, loss: dict[str, Any], start: float, steps: int, least: float
) -> None:
    context = context_for(tmp_path)
    metrics = run(stage(loss=loss, budget={"steps": steps}), context).metrics
    assert metrics["heldOut.toy.before.loss"] == pytest.approx(start, abs=1e-6)
    assert metrics["heldOut.toy.before.accuracy"] == 0.5
    assert metrics["heldOut.toy.before.margin"] == 0.0
    assert report_of(context)["history"][0]["loss"] == pytest.approx(start, abs=1e-6)
    assert metrics["heldOut.toy.accuracy"] > least
    assert metrics["heldOut.toy.margin"] > 0.0
    assert metrics["heldOut.toy.loss"] < start


def test_kto_learns_from_labels_too_and_reports_its_point(tmp_path: Path) -> None:
    train, test = write_labels(tmp_path / "l.jsonl", 36, seed=3), write_labels(tmp_path / "t.jsonl", 9, seed=4)
    context = context_for(tmp_path, train=train, test=test)
    metrics = run(stage(loss=KTO, budget={"steps": 5}), context).metrics
    assert metrics["heldOut.toy.accuracy"] > 0.6
    assert metrics["heldOut.toy.margin"] > 0.0
    assert metrics["heldOut.toy.point"] >= 0.0
    assert report_of(context)["data"]["train"]["answers"] == 36


def test_an_adapter_is_trained_over_the_merged_model_or_continued(tmp_path: Path) -> None:
    first = context_for(tmp_path / "first")
    lora = {"lora": {"rank": 4}}
    metrics = run(stage(trainable=lora, optimizer={"learningRate": 1e-2}), first).metrics
    assert metrics["heldOut.toy.before.margin"] == 0.0
    assert metrics["heldOut.toy.margin"] > 0.0
    assert (first.output / "adapter_model.safetensors").is_file()
    more = {"base": tmp_path / "first" / "base", "adapter": first.output}
    second = context_for(tmp_path / "second", **more)
    continued = {"lora": {"continueAdapter": True}}
    metrics = run(stage(model={"uri": "adapter"}, trainable=continued), second).metrics
    assert metrics["heldOut.toy.before.margin"] == 0.0  # the reference is the adapter as it was
    assert (second.output / "adapter_model.safetensors").is_file()


def test_a_resumed_stage_makes_the_same_bytes_and_asks_the_reference_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {
        "base": save_base(tmp_path / "base", make_tokenizer()),
        "other": save_base(tmp_path / "other", make_tokenizer(), seed=5),
        "train": write_pairs(tmp_path / "train.jsonl", 16, seed=1),
        "test": write_pairs(tmp_path / "test.jsonl", 4, seed=2),
    }
    config = stage(loss=KTO, reference={"uri": "other"}, checkpoints={"everySteps": 2}, batch={"samples": 4})
    loads: list[None] = []
    load = dpo._load_reference

    def note_and_load(*arguments: Any) -> Any:
        loads.append(None)
        return load(*arguments)

    monkeypatch.setattr(dpo, "_load_reference", note_and_load)
    whole = context_for(tmp_path / "whole", **inputs)
    run(config, whole)
    assert len(loads) == 1
    parted = context_for(tmp_path / "parted", **inputs)
    stop_and_resume(run, config, parted, at=2)
    assert len(loads) == 2
    assert content_of(parted.output) == content_of(whole.output)


def test_a_policy_that_is_not_the_reference_starts_with_an_opinion(tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", make_tokenizer(), seed=5)
    context = context_for(tmp_path, other=other)
    config = stage(reference={"uri": "other"}, budget={"steps": 1}, optimizer={"learningRate": 0.0})
    metrics = run(config, context).metrics
    before = metrics["heldOut.toy.before.margin"]
    assert before != 0.0
    assert metrics["heldOut.toy.margin"] == before  # nothing was learnt, and the reference stays
    reading = make_context(tmp_path / "read", "dpo", {"made": context.output})
    loaded = load_model(reading, Reference(uri="made"))
    base = load_model(context, stage().model)
    for name, item in base.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], item), name  # scoring left the policy as it was


# -- what is reported and refused --------------------------------------------------------------------------------------


def test_the_report_counts_what_became_of_the_answers(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "train.jsonl", 19, seed=1)
    same = {"prompt": "what", "chosen": "the dog", "rejected": "the dog"}
    path.write_text(path.read_text(encoding="utf-8") + json.dumps(same) + "\n", encoding="utf-8")
    context = context_for(tmp_path, train=path)
    run(stage(budget={"steps": 1}), context)
    counts = report_of(context)["data"]["train"]
    assert (counts["sameAnswers"], counts["fewAnswers"], counts["pairs"]) == (1, 1, 19)
    text = (context.output / "report.md").read_text(encoding="utf-8")
    assert "| train | 20 | 19 | 38 | 19 | 0 |" in text
    assert "| heldOut.toy.accuracy |" in text
    with pytest.raises(UserError, match=r"data: .*maxDroppedShare.*sameAnswers 1"):
        run(stage(maxDroppedShare=0.01), context)
    held_out = {"sets": [{"name": "toy", "uri": "train"}]}  # lm-eval#3421: what is not measured is bound, too
    with pytest.raises(UserError, match=r"heldOut\.sets: .*maxDroppedShare.*sameAnswers 1"):
        run(stage(maxDroppedShare=0.01, data=[{"uri": "test"}], heldOut=held_out), context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": None}, "no chat template; name one"),
        ({"trainable": {"lora": {"continueAdapter": True}}}, "`model` has whole weights, not an adapter"),
        ({"sequenceLength": 8}, "no preference to learn from is left"),
        ({"earlyStop": {"set": "other"}}, "earlyStop.set"),
        ({"data": [{"uri": "labels"}]}, "kto"),
        ({"reference": {"uri": "other"}}, "reference: it has another vocabulary"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    extra = tuple(f"piece{number}" for number in range(9))
    other = save_base(tmp_path / "other", make_tokenizer(extra=extra))
    labels = write_labels(tmp_path / "labels.jsonl", 6, seed=3)
    with pytest.raises(UserError, match=message):
        run(stage(**changes), context_for(tmp_path, other=other, labels=labels))


def test_kto_warns_of_a_point_that_is_zero_and_of_labels_of_one_kind(tmp_path: Path) -> None:
    """LLaMA-Factory's KTO: liked answers only, in its own layout."""
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the dog"}]
    train = tmp_path / "liked.jsonl"
    train.write_text("".join(json.dumps({"messages": turns, "label": True}) + "\n" for _ in range(3)), encoding="utf-8")
    context = context_for(tmp_path, train=train)
    run(stage(loss=KTO, batch={"samples": 1}, budget={"steps": 1}, heldOut={}), context)
    warnings = report_of(context)["warnings"]
    assert any("reference point" in warning for warning in warnings)
    assert any(warning.startswith("all 3 answers are liked") for warning in warnings)
