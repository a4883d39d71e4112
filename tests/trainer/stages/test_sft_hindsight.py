"""`sft` on ranked answers, end to end, on a model of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from stagecoach_api.kinds.sft import SftStage
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.samples import token_masking
from stagecoach_trainer.stages.sft import run
from tests.trainer.data.makers import write_jsonl
from tests.trainer.stages.makers import Workshop

PREFERENCES = [{"uri": "preferences", "name": "preferences"}]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    made = Workshop(tmp_path)
    pairs = [
        {"prompt": f"what is {index}", "chosen": f"the dog {index % 5}", "rejected": f"a fox {index % 7}"}
        for index in range(40)
    ]
    made.inputs["preferences"] = write_jsonl(tmp_path / "preferences.jsonl", pairs)
    return made


def report_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def test_ranked_answers_without_hindsight_are_rejected_with_advice(workshop: Workshop) -> None:
    with pytest.raises(UserError, match=r"preferences.*:1: a preference record.*`sft` with `hindsight`"):
        workshop.sft(data=PREFERENCES)


def test_chains_are_trained_on_measured_and_reported(workshop: Workshop) -> None:
    held_out = {"sets": [{"uri": "preferences", "name": "ranked", "maxSamples": 9}]}
    outcome, output = workshop.sft(data=PREFERENCES, hindsight={}, budget={"steps": 20}, heldOut=held_out)
    assert outcome.metrics["heldOut.ranked.loss"] < outcome.metrics["heldOut.ranked.before.loss"] - 1
    assert 0.005 < outcome.metrics["hindsight.hiddenShare"] < 0.05
    counts = report_of(output)["data"]["preferences"]
    assert (counts["records"], counts["chains"], counts["chainedAnswers"], counts["samples"]) == (40, 40, 80, 80)
    assert report_of(output)["metrics"]["hindsight.hiddenShare"] == outcome.metrics["hindsight.hiddenShare"]
    text = (output / "report.md").read_text()
    assert "Ranked answers of preferences: chains 40, chainedAnswers 80." in text
    assert "hindsight.hiddenShare" in text


def test_the_best_answer_trains_like_the_same_conversations(workshop: Workshop) -> None:
    talks = [{"instruction": f"what is {index}", "input": "", "output": f"the dog {index % 5}"} for index in range(40)]
    workshop.inputs["same"] = workshop.root / "same.json"
    workshop.inputs["same"].write_text(json.dumps(talks))
    best, output = workshop.sft("best", data=PREFERENCES, hindsight={"mode": "best"})
    plain, expected = workshop.sft("plain", data=[{"uri": "same", "format": "alpaca"}])
    assert best.metrics == plain.metrics
    assert (output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert report_of(output)["data"]["preferences"]["bestAnswers"] == 40


def test_no_token_is_masked_if_the_largest_share_is_0(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    unmasked, output = workshop.sft("unmasked", data=PREFERENCES, hindsight={"maxMaskedShare": 0})
    assert "hindsight.hiddenShare" not in unmasked.metrics
    masked, other = workshop.sft("masked", data=PREFERENCES, hindsight={"maxMaskedShare": 0.3})
    assert masked.metrics["loss"] != unmasked.metrics["loss"]
    monkeypatch.setattr(token_masking.TokenMasking, "apply", lambda self, row, step, number: row)
    _, patched = workshop.sft("patched", data=PREFERENCES, hindsight={"maxMaskedShare": 0.3})
    weights = [(path / "model.safetensors").read_bytes() for path in (output, other, patched)]
    assert weights[0] == weights[2] != weights[1]


def test_chains_conversations_and_text_are_mixed_by_their_weights(workshop: Workshop) -> None:
    data = [
        {"uri": "preferences", "name": "preferences", "weight": 2},
        {"uri": "talks", "name": "talks", "format": "alpaca", "weight": 1},
        {"uri": "texts", "name": "texts", "weight": 1},
    ]
    _, output = workshop.sft(data=data, hindsight={}, budget={"steps": 40}, batch={"samples": 20})
    report = report_of(output)
    drawn, counts = report["phases"][0]["samples"], report["data"]
    tokens = {name: drawn[name] * counts[name]["tokens"] / counts[name]["samples"] for name in drawn}
    shares = {name: found / sum(tokens.values()) for name, found in tokens.items()}
    assert shares == pytest.approx({"preferences": 0.5, "talks": 0.25, "texts": 0.25}, abs=0.01)
    assert counts["texts"]["trainedTokens"] == counts["texts"]["tokens"] - counts["texts"]["samples"]
    assert "chains" not in counts["talks"]
    assert counts["preferences"]["trainedTokens"] < counts["preferences"]["tokens"] / 2


def test_too_many_answers_without_a_preference_fail_the_stage(workshop: Workshop) -> None:
    pairs = [{"prompt": "q", "chosen": "the dog", "rejected": "the dog" if index < 4 else "no"} for index in range(40)]
    write_jsonl(workshop.inputs["preferences"], pairs)
    with pytest.raises(UserError, match=r"data: 5\.3% of the samples.*sameAnswers 4"):
        workshop.sft(data=PREFERENCES, hindsight={})
    _, output = workshop.sft("allowed", data=PREFERENCES, hindsight={}, maxDroppedShare=0.2)
    assert report_of(output)["data"]["preferences"]["sameAnswers"] == 4


def test_hindsight_without_ranked_answers_gives_a_warning(workshop: Workshop) -> None:
    _, output = workshop.sft(hindsight={})
    assert "no data set has preference records" in report_of(output)["warnings"][-1]


def test_a_resumed_stage_masks_the_same_tokens(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {
        "model": {"uri": "base"},
        "data": PREFERENCES,
        "template": {"name": "alpaca"},
        "sequenceLength": 160,
        "budget": {"steps": 8},
        "batch": {"tokens": 320, "microBatchRows": 2},
        "optimizer": {"learningRate": 0.01},
        "precision": "fp32",
        "checkpoints": {"everySteps": 2},
        "hindsight": {"maxMaskedShare": 0.3},
    }
    stage = SftStage.model_validate(config)
    uninterrupted = workshop.context("sft", "uninterrupted")
    expected = run(stage, uninterrupted)
    context = workshop.context("sft", "stopped")
    apply = token_masking.TokenMasking.apply

    def stopping(self: token_masking.TokenMasking, row: Row, step: int, number: int) -> Row:
        if step == 5:
            context.stop.set()
        return apply(self, row, step, number)

    with monkeypatch.context() as patch:
        patch.setattr(token_masking.TokenMasking, "apply", stopping)
        with pytest.raises(Interrupted, match=r"stopped after step [1-7] of 8"):
            run(stage, context)
    again = workshop.context("sft", "stopped")
    assert run(stage, again).metrics == expected.metrics
    found, whole = (load_file(folder.output / "model.safetensors") for folder in (again, uninterrupted))
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
