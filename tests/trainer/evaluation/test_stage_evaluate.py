"""The whole stage `evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.artifacts import REPORT, REPORT_TEXT
from stagecoach_api.kinds.evaluate import EvaluateStage
from stagecoach_api.references import Reference
from stagecoach_trainer.generation.generation import Prompter
from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import GateFailed, Interrupted, UserError
from stagecoach_trainer.stages.evaluate import run
from tests.trainer.data.makers import write_jsonl
from tests.trainer.evaluation.makers import QUESTIONS, naive_answer, save_chat_adapter, save_chat_base
from tests.trainer.models.makers import make_context, make_tokenizer, report_of, save_base

TEXTS = ({"text": "the quick brown fox"}, {"text": "白日依山尽 | 黄河入海流"})
CONFIG: dict[str, Any] = {
    "model": {"uri": "model"},
    "heldOut": [{"name": "zh", "uri": "text"}],
    "exactMatch": [{"name": "verse", "data": {"name": "v", "uri": "questions"}, "generation": {"maxNewTokens": 6}}],
    "samples": {"prompts": [QUESTIONS[0], "a | b\nc"], "generation": {"maxNewTokens": 4}},
    "sequenceLength": 64,
    "batchRows": 3,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter so large that its answers are not the base's."""
    root = tmp_path_factory.mktemp("adapter")
    return save_chat_adapter(root, base, root / "output", size=0.8)


@pytest.fixture(scope="module")
def inputs(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, a text, and questions of which the model answers the first two as its naive greedy loop does."""
    root = tmp_path_factory.mktemp("inputs")
    loaded = load_model(make_context(root / "look", inputs={"model": adapter}), Reference(uri="model"))
    tokenizer = loaded.require_tokenizer()
    questions = []
    for index, question in enumerate(QUESTIONS):
        said = naive_answer(
            loaded.model.eval(), Prompter(tokenizer).encode_question(question), 6, [tokenizer.eos_token_id]
        )
        answer = tokenizer.decode(said, skip_special_tokens=True).strip() if index < 2 else "something else"
        questions.append({"instruction": question, "input": "", "output": f" {answer} \n", "topic": "x"})
    return {
        "model": adapter,
        "text": write_jsonl(root / "text.jsonl", TEXTS),
        "questions": write_jsonl(root / "questions.jsonl", questions),
    }


def evaluate(
    root: Path, inputs: dict[str, Path], config: dict[str, Any] = CONFIG, **changes: Any
) -> tuple[StageOutcome, StageContext]:
    context = make_context(root, "evaluate", inputs)
    return run(EvaluateStage.model_validate(config | changes), context), context


def test_everything_that_is_configured_is_measured_and_reported(tmp_path: Path, inputs: dict[str, Path]) -> None:
    gates = [{"metric": "verse.exactMatch", "atLeast": 0.5}, {"metric": "heldOut.zh.loss", "atMost": 100}]
    outcome, context = evaluate(tmp_path, inputs, gates=gates)
    report = report_of(context)
    assert outcome.metrics == report["metrics"]
    assert outcome.metrics["verse.exactMatch"] == 0.5
    assert report["exactMatch"]["verse"]["questions"] == 4
    assert [case["right"] for case in report["exactMatch"]["verse"]["cases"]] == [True, True, False, False]
    assert report["heldOut"]["zh"]["characters"] == sum(len(item["text"]) for item in TEXTS)
    assert [sample["prompt"] for sample in report["samples"]] == [QUESTIONS[0], "a | b\nc"]
    assert [gate["passed"] for gate in report["gates"]] == [True, True]
    assert report["warnings"] == ["v: fields not read: topic (4 records)"]
    text = (context.output / REPORT_TEXT).read_text(encoding="utf-8")
    assert "| verse.exactMatch | 0.5 |" in text
    assert "| verse.exactMatch | 0.5 | ≥ 0.5 | passed |" in text
    assert r"| a \| b<br>c |" in text
    assert sorted(path.name for path in context.output.iterdir()) == [REPORT, REPORT_TEXT]


def test_equal_runs_give_equal_bytes_and_another_model_gives_others(
    tmp_path: Path, inputs: dict[str, Path], base: Path
) -> None:
    reports = [evaluate(tmp_path / name, inputs)[1].output for name in ("one", "two")]
    first, second = ([(path / name).read_bytes() for name in (REPORT, REPORT_TEXT)] for path in reports)
    assert first == second
    assert str(tmp_path).encode() not in first[0]
    other, _ = evaluate(tmp_path / "base", inputs | {"model": base}, heldOut=CONFIG["heldOut"], exactMatch=[])
    assert other.metrics["heldOut.zh.loss"] != json.loads(first[0])["metrics"]["heldOut.zh.loss"]


def test_low_precision_measures_nearly_the_same(tmp_path: Path, inputs: dict[str, Path]) -> None:
    full, _ = evaluate(tmp_path / "fp32", inputs, exactMatch=[])
    low, _ = evaluate(tmp_path / "bf16", inputs, exactMatch=[], precision="bf16")
    difference = abs(low.metrics["heldOut.zh.loss"] - full.metrics["heldOut.zh.loss"])
    assert 0 < difference < 0.05 * full.metrics["heldOut.zh.loss"]


def test_a_missed_gate_fails_the_stage_and_its_report_survives(tmp_path: Path, inputs: dict[str, Path]) -> None:
    gates = [{"metric": "verse.exactMatch", "atLeast": 0.9}, {"metric": "heldOut.zh.loss", "atMost": 0.001}]
    with pytest.raises(GateFailed) as caught:
        evaluate(tmp_path, inputs, gates=gates)
    assert "verse.exactMatch is 0.5, the gate requires ≥ 0.9; heldOut.zh.loss is " in str(caught.value)
    for folder in (tmp_path / "work" / "output", tmp_path / "work" / "logs"):
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        assert [gate["passed"] for gate in report["gates"]] == [False, False]
        assert "missed (stop)" in (folder / REPORT_TEXT).read_text(encoding="utf-8")


def test_a_gate_that_continues_is_recorded_only(tmp_path: Path, inputs: dict[str, Path]) -> None:
    gates = [{"metric": "verse.exactMatch", "atLeast": 0.9, "onFailure": "continue"}]
    outcome, context = evaluate(tmp_path, inputs, gates=gates)
    assert outcome.metrics["verse.exactMatch"] == 0.5
    assert report_of(context)["gates"][0]["passed"] is False


def test_a_gate_on_an_unknown_metric_is_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    gates = [{"metric": "heldOut.zh.bitsPerCharakter", "atMost": 1}]
    with pytest.raises(UserError, match=r"did you mean `heldOut\.zh\.bitsPerCharacter`\?.* It measures: heldOut"):
        evaluate(tmp_path, {}, gates=gates)


def test_a_template_of_the_stage_takes_the_place_of_the_models(tmp_path: Path, inputs: dict[str, Path]) -> None:
    _, plain = evaluate(tmp_path / "alpaca", inputs, exactMatch=[], heldOut=[])
    _, other = evaluate(tmp_path / "vicuna", inputs, exactMatch=[], heldOut=[], template={"name": "vicuna"})
    assert report_of(plain)["samples"] != report_of(other)["samples"]


def test_a_model_without_a_chat_template_continues_plain_text_with_a_warning(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", make_tokenizer())
    _, context = evaluate(tmp_path / "run", {"model": folder}, heldOut=[], exactMatch=[])
    assert "no chat template" in report_of(context)["warnings"][0]
    assert len(report_of(context)["samples"]) == 2


def test_a_record_without_an_answer_is_named(tmp_path: Path, inputs: dict[str, Path]) -> None:
    talk = {"messages": [{"role": "user", "content": "?"}]}
    questions = write_jsonl(tmp_path / "q.jsonl", [talk])
    with pytest.raises(UserError, match=r"questions:1: .*verse needs conversations in which the assistant answers"):
        evaluate(tmp_path, inputs | {"questions": questions}, heldOut=[])


def test_the_harness_is_not_imported_unless_a_task_asks(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    evaluate(tmp_path, inputs, exactMatch=[], samples=None)
    assert sys.modules["lm_eval"] is None


def test_a_stop_takes_effect_between_two_measurements(tmp_path: Path, inputs: dict[str, Path]) -> None:
    context = make_context(tmp_path, "evaluate", inputs)
    context.stop.set()
    with pytest.raises(Interrupted):
        run(EvaluateStage.model_validate(CONFIG), context)
    assert not (context.output / REPORT).exists()
