"""Comparison by reward: the whole stage, against answers generated and judged one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.artifacts import REPORT, REPORT_TEXT, ModelCard, RewardCard
from stagecoach_api.kinds.evaluate import EvaluateStage
from stagecoach_api.references import Reference
from stagecoach_trainer.evaluation.reward_comparison import win_rate
from stagecoach_trainer.generation.generation import Prompter
from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.models.reward import RewardModel, make_reward_model
from stagecoach_trainer.models.save import save_model
from stagecoach_trainer.rewards import Score
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import GateFailed, UserError
from stagecoach_trainer.stages.evaluate import run
from tests.trainer.align.makers import rewards_of
from tests.trainer.data.makers import write_jsonl
from tests.trainer.evaluation.makers import (
    QUESTIONS,
    chat_tokenizer,
    naive_answer,
    save_chat_adapter,
    save_chat_base,
)
from tests.trainer.models.makers import make_context, make_model
from tests.trainer.rewards.makers import TinyJudge, endpoint_of, evaluate_stage, feedback_term, serve

TERMS = (
    {"name": "characters", "expression": "characters", "weight": 0.5},
    {"name": "latin", "language": {"script": "latin"}},
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compare")
    base = save_chat_base(root / "base")
    records: list[dict[str, Any]] = [
        {"instruction": question, "input": "", "output": "unused", "topic": "x"} for question in QUESTIONS
    ]
    model = save_chat_adapter(root / "making", base, root / "adapter", size=0.8)
    return {"model": model, "rival": base, "prompts": write_jsonl(root / "prompts.jsonl", records)}


def evaluate(root: Path, inputs: dict[str, Path], *terms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    gates = changes.pop("gates", [])
    config = evaluate_stage(*terms, **changes)["evaluate"] | {"gates": gates}
    context = make_context(root, "evaluate", inputs)
    run(EvaluateStage.model_validate(config), context)
    report: dict[str, Any] = json.loads((context.output / REPORT).read_text(encoding="utf-8"))
    return report


def answers_of(root: Path, inputs: dict[str, Path], name: str) -> list[str]:
    loaded = load_model(make_context(root / name, inputs=inputs), Reference(uri=name))
    tokenizer = loaded.require_tokenizer()
    prompter, end = Prompter(tokenizer), tokenizer.eos_token_id
    said = [naive_answer(loaded.model.eval(), prompter.encode_question(text), 6, [end]) for text in QUESTIONS]
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in said]


def worth(answer: str) -> float:
    characters = [character for character in answer if not character.isspace()]
    latin = [character for character in characters if character.isascii() and character.isalpha()]
    return 0.5 * len(answer) + (len(latin) / len(characters) if characters else 0.0)


def test_rewards_and_win_rates_are_those_of_answers_judged_one_by_one(tmp_path: Path, inputs: dict[str, Path]) -> None:
    report = evaluate(tmp_path / "run", inputs, *TERMS)
    own, other = (answers_of(tmp_path, inputs, name) for name in ("model", "rival"))
    assert own != other
    found = report["rewards"]["help"]
    assert [case["answers"] for case in found["cases"]] == [
        {"model": one, "before": two} for one, two in zip(own, other, strict=True)
    ]
    rewards, others = [worth(answer) for answer in own], [worth(answer) for answer in other]
    wins = [(one > two) + 0.5 * (one == two) for one, two in zip(rewards, others, strict=True)]
    assert report["metrics"] == pytest.approx(
        {
            "help.reward": sum(rewards) / 4,
            "help.reward.before": sum(others) / 4,
            "help.winRate.before": sum(wins) / 4,
        }
    )
    assert found["models"]["model"]["terms"]["characters"] == pytest.approx(sum(map(len, own)) / 4)
    assert found["prompts"] == 4
    assert any("fields not read: topic (4 records)" in text for text in report["warnings"])


def test_the_report_shows_answers_side_by_side_and_equal_runs_give_equal_bytes(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    for name in ("one", "two"):
        evaluate(tmp_path / name, inputs, *TERMS, maxSamples=2)
    first, second = (tmp_path / name / "work" / "output" for name in ("one", "two"))
    for file in (REPORT, REPORT_TEXT):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    text = (first / REPORT_TEXT).read_text(encoding="utf-8")
    assert "## help: rewards of 2 prompts" in text
    assert "| answers of | reward | characters | latin | tokens | ended |" in text
    assert "| prompt | model | before |" in text


def test_a_model_against_itself_wins_half(tmp_path: Path, inputs: dict[str, Path]) -> None:
    report = evaluate(tmp_path, inputs | {"rival": inputs["model"]}, *TERMS)
    assert report["metrics"]["help.winRate.before"] == 0.5


def test_a_judge_at_an_endpoint_marks_all_models_alike(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with serve(TinyJudge().mark) as running:
        report = evaluate(tmp_path, inputs, feedback_term(running.url))
    found = report["rewards"]["help"]
    assert found["terms"]["mark"] == {"requests": running.num_requests, "unparsable": 0}
    assert 0.0 <= report["metrics"]["help.reward"] <= 1.0


def test_the_one_rank_that_evaluates_has_the_whole_budget(tmp_path: Path, inputs: dict[str, Path]) -> None:
    world = World(rank=0, local_rank=0, size=2, local_size=2)  # the other one goes home
    with serve(TinyJudge().mark) as running:
        term = feedback_term(running.url, endpoint=endpoint_of(running.url, maxRequests=2 * len(QUESTIONS)))
        config = EvaluateStage.model_validate(evaluate_stage(term)["evaluate"])
        context = make_context(tmp_path, "evaluate", inputs, world=world)
        run(config, context)
    report = json.loads((context.output / REPORT).read_text(encoding="utf-8"))
    assert report["rewards"]["help"]["terms"]["mark"]["requests"] == running.num_requests > len(QUESTIONS)


def save_judge(root: Path) -> tuple[RewardModel, Path]:
    """Write a reward model that has a system prompt for poems."""
    tokenizer, domains = chat_tokenizer(), {"poems": "Judge the poem."}
    reward = RewardModel(make_reward_model(make_model(len(tokenizer)), seed=3).eval(), tokenizer, 0.0, domains)
    vocabulary, folder = root / "vocabulary", root / "judge"
    tokenizer.save_pretrained(vocabulary)
    folder.mkdir()
    save_model(
        reward.model, tokenizer, vocabulary, folder, ModelCard(reward=RewardCard(domains=domains), adapter=False)
    )
    return reward, folder


@pytest.mark.parametrize("domain", [None, "poems"])
def test_answers_are_scored_with_the_system_prompt_of_the_tasks_domain(
    tmp_path: Path, inputs: dict[str, Path], domain: str | None
) -> None:
    reward, folder = save_judge(tmp_path)
    on = {"name": "prompts", "uri": "prompts", "domain": domain}
    term = {"name": "judge", "model": {"uri": "judge"}}
    report = evaluate(tmp_path / "run", inputs | {"judge": folder}, term, data=on, rivals=[])
    said = [({"role": "user", "content": text},) for text in QUESTIONS]
    asked = list(zip(said, answers_of(tmp_path, inputs, "model"), strict=True))
    by_hand = {name: sum(rewards_of(reward, asked, 1, name)) / len(asked) for name in (None, "poems")}
    assert report["metrics"]["help.reward"] == pytest.approx(by_hand[domain], abs=1e-5)
    assert abs(by_hand[None] - by_hand["poems"]) > 1e-4


def test_an_unknown_domain_is_reported_with_its_field(tmp_path: Path, inputs: dict[str, Path]) -> None:
    judge = inputs | {"judge": save_judge(tmp_path)[1]}
    on = {"name": "prompts", "uri": "prompts", "domain": "songs"}
    with pytest.raises(UserError, match=r"rewards\[0\]\.data\.domain: .* has no domain 'songs', only poems"):
        evaluate(tmp_path / "run", judge, {"name": "judge", "model": {"uri": "judge"}}, data=on)


def test_a_gate_on_a_win_rate_stops_the_run(tmp_path: Path, inputs: dict[str, Path]) -> None:
    gates = [{"metric": "help.winRate.before", "atLeast": 1.1}]
    with pytest.raises(GateFailed, match=r"help\.winRate\.before is "):
        evaluate(tmp_path, inputs, *TERMS, gates=gates)


def test_invalid_rewards_are_reported_with_their_field(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"rewards\[0\]\.rewards\[0\]\.format\.match: "):
        evaluate(tmp_path, inputs, {"name": "f", "format": {"match": "("}})


def test_a_record_that_is_an_answer_only_is_named(tmp_path: Path, inputs: dict[str, Path]) -> None:
    talk = {"messages": [{"role": "assistant", "content": "hello"}]}
    prompts = write_jsonl(tmp_path / "p.jsonl", [talk])
    with pytest.raises(UserError, match=r"prompts:1: rewards help needs prompts"):
        evaluate(tmp_path, inputs | {"prompts": prompts}, *TERMS)


def test_a_tie_is_half_a_win() -> None:
    own, other = [Score(value) for value in (1.0, 2.0, 3.0)], [Score(value) for value in (1.0, 3.0, 2.0)]
    assert win_rate(own, other) == 0.5
    assert win_rate(own[:2], other[:2]) == 0.25
