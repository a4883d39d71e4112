"""The `ppo` stage: a policy, a reward and prompts in, a better policy and its report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagecoach_api.artifacts import ModelCard, RewardCard
from stagecoach_api.conversation import Template
from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_trainer.models.load import load_folder
from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.models.save import save_model
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.stages.ppo import run
from stagecoach_trainer.text.templates import apply_template
from tests.trainer.models.makers import content_of, make_context, make_tokenizer, report_of, save_base, save_family
from tests.trainer.rewards.makers import Chat, Endpoint, endpoint_of, serve

PROMPTS = ("what is a fox", "the lazy dog", "a task for the model", "brown words", "over the quick dog", "next")
SHORT = {"name": "short", "length": {"atMost": 12}}
TEMPLATE = {"name": "humanBot"}


def stage(**changes: Any) -> PpoStage:
    values: dict[str, Any] = {
        "model": {"uri": "base"},
        "template": TEMPLATE,
        "data": [{"uri": "prompts"}],
        "rewards": [SHORT],
        "sequenceLength": 96,
        "batch": {"samples": 4, "microBatchRows": 2},
        "budget": {"steps": 3},
        "optimizer": {"learningRate": 1e-3},
        "rollout": {"maxNewTokens": 12, "batchRows": 4},
        "guards": {"minEndedShare": None},
        "precision": "fp32",
        "checkpoints": {"everySteps": 1},
    }
    return PpoStage.model_validate(values | changes)


def write_prompts(path: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    lines = [json.dumps({"instruction": prompt, "output": "an answer that is left out"}) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_reward(root: Path, base: Path, tokenizer: Any = None, **domains: str) -> Path:
    """Write a reward model over the weights of `base`, as a `rewardModel` stage does; `domains`: system prompts."""
    tokenizer = tokenizer or make_tokenizer()
    model = make_reward_model(load_folder(base), seed=3)
    apply_template(tokenizer, Template.model_validate(TEMPLATE))
    vocabulary = root / "vocabulary"
    tokenizer.save_pretrained(vocabulary)
    folder = root / "reward"
    folder.mkdir()
    save_model(
        model, tokenizer, vocabulary, folder, ModelCard(adapter=False, reward=RewardCard(bias=0.5, domains=domains))
    )
    return folder


def context_for(root: Path, **inputs: Path) -> StageContext:
    root.mkdir(parents=True, exist_ok=True)
    found = {
        "base": inputs.get("base") or save_base(root / "base", make_tokenizer()),
        "prompts": inputs.get("prompts") or write_prompts(root / "prompts.jsonl"),
    }
    return make_context(root, "ppo", found | inputs)


def test_the_output_opens_in_transformers_and_the_report_lists_the_updates(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    reward = save_reward(tmp_path, base)
    context = context_for(tmp_path, base=base, reward=reward)
    outcome = run(stage(rewards=[{"name": "helpful", "model": {"uri": "reward"}}, SHORT]), context)
    model: Any = AutoModelForCausalLM.from_pretrained(context.output)
    tokenizer: Any = AutoTokenizer.from_pretrained(context.output)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a fox"}], tokenize=False)
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=3)
    assert torch.isfinite(model(output).logits).all()
    before = load_file(base / "model.safetensors")
    after = load_file(context.output / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"].to(before["lm_head.weight"].dtype))
    report = report_of(context)
    assert report["data"]["prompts"] == {"records": 6, "prompts": 6, "tooLong": 0, "empty": 0}
    assert (report["updates"], report["samplesPerUpdate"], report["tokens"]) == (3, 4, outcome.tokens)
    assert [point["step"] for point in report["history"]] == [1, 2, 3]
    for point in report["history"]:
        assert point["reward"] == pytest.approx(point["reward.helpful"] + point["reward.short"])
    assert report["history"][0]["kl"] == 0.0
    assert outcome.metrics["reward"] == report["history"][-1]["reward"]
    words = (context.output / "report.md").read_text(encoding="utf-8")
    assert "3 updates of 4 answers" in words
    assert "| update | reward | kl | entropy | endedShare | answerTokens |" in words


def test_an_adapter_shares_its_base_with_the_reference_and_is_what_comes_out(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    settings = {"lora": {"rank": 2}}
    run(stage(trainable=settings, optimizer={"learningRate": 1e-2}), context)
    assert (context.output / "adapter_model.safetensors").is_file()
    assert not (context.output / "model.safetensors").exists()
    history = report_of(context)["history"]
    assert history[0]["kl"] == 0.0
    assert history[-1]["kl"] != 0.0


def test_answers_are_scored_with_the_system_prompt_of_their_prompts_domain(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    reward = save_reward(tmp_path, base, poems="is the answer a poem of the fox")
    points = {}
    for domain in (None, "poems"):
        context = context_for(tmp_path / str(domain), base=base, reward=reward)
        data, terms = [{"uri": "prompts", "domain": domain}], [{"name": "helpful", "model": {"uri": "reward"}}]
        run(stage(data=data, rewards=terms, budget={"steps": 1}), context)
        points[domain] = report_of(context)["history"][0]
    same = ("answerTokens", "entropy", "kl")  # the policy's prompts and answers are equal
    assert [points[None][name] for name in same] == [points["poems"][name] for name in same]
    assert abs(points[None]["reward"] - points["poems"]["reward"]) > 1e-4


def test_a_domain_that_the_reward_model_lacks_is_reported(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    context = context_for(tmp_path, base=base, reward=save_reward(tmp_path, base, poems="Judge the poem."))
    terms = [{"name": "helpful", "model": {"uri": "reward"}}]
    with pytest.raises(UserError, match=r"data\[0\]\.domain: .*rewards\[0\] has no domain 'songs', only poems"):
        run(stage(data=[{"uri": "prompts", "domain": "songs"}], rewards=terms), context)


def test_a_resumed_stage_makes_the_same_bytes(tmp_path: Path) -> None:
    base, prompts = save_base(tmp_path / "base", make_tokenizer()), write_prompts(tmp_path / "prompts.jsonl")
    reward = save_reward(tmp_path, base)
    config = stage(
        rewards=[{"name": "helpful", "model": {"uri": "reward"}}],
        rollout={"maxNewTokens": 12, "batchRows": 2},
        pretraining={"data": [{"uri": "prompts"}], "weight": 2.0, "rowsPerStep": 1},
    )
    whole, parted = (
        context_for(tmp_path / name, base=base, prompts=prompts, reward=reward) for name in ("whole", "parted")
    )
    run(config, whole)
    report = parted.progress.report
    answered = []

    def stop_in_the_middle(activity: str, *rest: Any, **more: Any) -> None:
        report(activity, *rest, **more)
        answered.append(activity)
        if answered.count("answer") == 3:  # half of the second update's answers
            parted.stop.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parted.progress, "report", stop_in_the_middle)
        with pytest.raises(Interrupted, match="after update 1 of 3"):
            run(config, parted)
    parted.stop.clear()
    run(config, parted)
    assert content_of(parted.output) == content_of(whole.output)


def write_texts(path: Path, texts: tuple[str, ...]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_the_report_has_the_counts_of_the_pretraining_text(tmp_path: Path) -> None:
    long = " ".join(["the quick brown fox"] * 60)
    context = context_for(
        tmp_path,
        talks=write_prompts(tmp_path / "talks.jsonl", (*PROMPTS, long)),
        texts=write_texts(tmp_path / "texts.jsonl", ("the lazy dog", "", "a fox")),
    )
    mixed = {"data": [{"uri": "talks"}, {"uri": "texts", "format": "text"}], "weight": 1, "rowsPerStep": 1}
    run(stage(pretraining=mixed, maxDroppedShare=0.3, budget={"steps": 1}), context)
    found = report_of(context)["pretraining"]
    assert {name: found["talks"][name] for name in ("records", "samples", "tooLong")} == {
        "records": 7,
        "samples": 6,
        "tooLong": 1,
    }
    assert {name: found["texts"][name] for name in ("records", "samples", "emptyText")} == {
        "records": 3,
        "samples": 2,
        "emptyText": 1,
    }
    words = (context.output / "report.md").read_text(encoding="utf-8")
    assert "| text beside | records | samples | tokens | tooLong | cut | noLoss | emptyText |" in words
    assert "| talks | 7 | 6 |" in words


def test_text_is_rejected_for_a_model_whose_packed_samples_see_each_other(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.jsonl", ("the lazy dog", "a fox"))
    inputs = {"base": save_family(tmp_path / "bloom", "bloom", make_tokenizer()), "texts": texts}
    run(stage(budget={"steps": 1}), context_for(tmp_path / "alone", **inputs))
    mixed = {"data": [{"uri": "texts", "format": "text"}], "weight": 1, "rowsPerStep": 1}
    with pytest.raises(UserError, match="packed samples see each other"):
        run(stage(pretraining=mixed, budget={"steps": 1}), context_for(tmp_path / "mixed", **inputs))


def test_text_of_which_too_much_is_left_out_stops_the_stage(tmp_path: Path) -> None:
    long = " ".join(["the quick brown fox"] * 60)
    context = context_for(tmp_path, talks=write_prompts(tmp_path / "talks.jsonl", (*PROMPTS, long, long + " dog")))
    mixed = {"data": [{"uri": "talks"}], "weight": 1}
    with pytest.raises(
        UserError, match=r"^pretraining\.data: 25\.0% of the samples .* `maxDroppedShare` 20\.0% \(talks: "
    ):
        run(stage(pretraining=mixed, maxDroppedShare=0.2), context)


RANKED = [
    {"prompt": "name an animal", "answers": ["a fox is an animal", "a fox", "word"]},
    {"prompt": "say it", "answers": ["the fox sleeps", "over the dog"]},
]
"""Weights are fitted on these."""


def knows_foxes(messages: Chat) -> str:
    answer = json.loads(messages[-1]["content"].split("Answer: ")[1].split("\n")[0])
    return "yes" if "fox" in answer else "no"


def fitting_requests(judge: Endpoint) -> int:
    texts = [body["messages"][-1]["content"] for body in judge.bodies]
    return sum(any(json.dumps(record["prompt"]) in text for record in RANKED) for text in texts)


@pytest.mark.parametrize("first_update", [1, 2])
def test_weights_are_fitted_once_however_often_a_stage_is_resumed(tmp_path: Path, first_update: int) -> None:
    """A stage that dies in its first update has fitted them already, and one that is stopped in its second."""
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text("\n".join(map(json.dumps, RANKED)) + "\n", encoding="utf-8")
    context = context_for(tmp_path / "run", ranked=ranked)
    report, answered = context.progress.report, []

    def interrupt(activity: str, *rest: Any, **more: Any) -> None:
        report(activity, *rest, **more)
        answered.append(activity)
        if answered.count("answer") == first_update:
            raise Interrupted("killed")

    with serve(knows_foxes) as judge:
        rules = {
            "endpoint": endpoint_of(judge.url, maxRequests=5 + 3 * 4),
            "propositions": [{"name": "fox", "text": "It names a fox."}],
            "fit": {"name": "ranked", "uri": "ranked", "format": "ranked"},
        }
        config = stage(rewards=[{"name": "rules", "propositions": rules}, SHORT])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(context.progress, "report", interrupt)
            with pytest.raises(Interrupted, match="killed"):
                run(config, context)
        assert fitting_requests(judge) == 5
        run(config, context)
        assert fitting_requests(judge) == 5
    figures = report_of(context)["rewards"]["rules"]
    assert figures["weight.fox"] == pytest.approx(1.0)
    assert figures["orderedPairs"] < 1.0  # two of them have no fox, or both


# -- what is counted, what is refused ----------------------------------------------------------------------------------


def test_prompts_that_leave_no_room_and_prompts_that_ask_nothing_are_counted(tmp_path: Path) -> None:
    long = " ".join(["the quick brown fox"] * 30)
    prompts = write_prompts(tmp_path / "prompts.jsonl", (*PROMPTS, long, long + " dog", "  "))
    context = context_for(tmp_path, prompts=prompts)
    run(stage(maxDroppedShare=0.5, budget={"steps": 1}), context)
    assert report_of(context)["data"]["prompts"] == {"records": 9, "prompts": 6, "tooLong": 2, "empty": 1}
    assert "| prompts | 9 | 6 | 2 | 1 |" in (context.output / "report.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"33.3% of prompts's prompts were left out \(tooLong 2, empty 1\)"):
        run(stage(maxDroppedShare=0.1), context_for(tmp_path / "strict", prompts=prompts))
    with pytest.raises(UserError, match="has no usable prompts"):
        run(stage(sequenceLength=16), context_for(tmp_path / "none", prompts=prompts))


def test_empty_answers_are_counted(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] *= 0.0  # every token is as likely as any other
    weights["lm_head.weight"][2] = 0.0
    from safetensors.torch import save_file

    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    everything = list(range(2, len(make_tokenizer()), 2))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": everything}))
    (base / "config.json").write_text(json.dumps(config))
    context = context_for(tmp_path, base=base)
    run(stage(batch={"samples": 24, "microBatchRows": 24}, budget={"steps": 1}), context)
    point = report_of(context)["history"][0]
    assert 0.2 < point["emptyShare"] < 0.8  # half of all tokens end an answer
    assert point["endedShare"] > 0.9


def test_a_reward_model_of_another_vocabulary_cannot_become_the_critic(tmp_path: Path) -> None:
    other = make_tokenizer(extra=("piece",))
    base = save_base(tmp_path / "base", make_tokenizer())
    reward = save_reward(tmp_path, save_base(tmp_path / "other", other), other)
    config = stage(rewards=[{"name": "helpful", "model": {"uri": "reward"}}])
    with pytest.raises(UserError, match=r"rewards: the reward model has another vocabulary: .*such as 'piece'"):
        run(config, context_for(tmp_path, base=base, reward=reward))
    config = stage(critic={"model": {"uri": "reward"}})
    with pytest.raises(UserError, match=r"critic.model: the reward model has another vocabulary"):
        run(config, context_for(tmp_path / "second", base=base, reward=reward))


def test_a_reference_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", make_tokenizer(extra=("piece",)))
    with pytest.raises(UserError, match="reference: it has another vocabulary"):
        run(stage(reference={"uri": "other"}), context_for(tmp_path, other=other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": None}, "no chat template; name one"),
        ({"trainable": {"lora": {"continueAdapter": True}}}, "continueAdapter"),
        ({"rollout": {"maxNewTokens": 96}}, "leaves no tokens for a prompt"),
        ({"data": [{"uri": "prompts", "weight": 1.0}, {"uri": "prompts", "name": "b"}]}, "to every set or to none"),
        ({"rewards": [SHORT, SHORT]}, "two terms are named `short`"),
        ({"rollout": {"engine": "vllm", "maxNewTokens": 4}}, "vllm is not installed in this image"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(stage(**changes), context_for(tmp_path))


def test_a_reward_expression_that_tries_to_import_is_refused(tmp_path: Path) -> None:
    evil = {"name": "evil", "expression": '__import__("os").system("true")'}
    with pytest.raises(UserError, match=r"rewards\[0\].expression: .*__import__"):
        run(stage(rewards=[evil]), context_for(tmp_path))


def test_a_constant_reward_stops_the_stage_with_its_reason(tmp_path: Path) -> None:
    from stagecoach_trainer.runtime.errors import Diverged

    with pytest.raises(Diverged, match=r"update 3: constant reward.*guards.minRewardDeviation"):
        run(stage(rewards=[{"name": "same", "expression": "1"}], budget={"steps": 5}), context_for(tmp_path))
