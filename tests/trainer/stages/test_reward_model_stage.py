"""The `rewardModel` stage: preferences in, a reward model and its report out."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stagecoach_api.artifacts import ModelCard
from stagecoach_api.kinds.reward_model import BiasOn, FocalLoss, PairLoss, PreferenceLoss, RankedLoss, RewardModelStage
from stagecoach_api.references import Reference
from stagecoach_trainer.align.reward_held_out import length_baseline
from stagecoach_trainer.align.reward_objective import RewardObjective, collate_pairs
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.models import shipping
from stagecoach_trainer.models.reward import RewardModel, load_reward_model, make_reward_model
from stagecoach_trainer.models.save import save_adapter
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.groups import Counting, Group, TokenSequence, pairs_of
from stagecoach_trainer.stages.reward_model import run
from tests.trainer.align.makers import BAD, GOOD, LEARNS, preference_context, rewards_of, stop_and_resume, write_pairs
from tests.trainer.models.makers import content_of, make_context, make_model, make_tokenizer, report_of, save_base

PAIR = PreferenceLoss(pair=PairLoss())
RANKED = PreferenceLoss(ranked=RankedLoss())
FOCAL = PreferenceLoss(focal=FocalLoss())


# -- makers ------------------------------------------------------------------------------------------------------------


def groups(sizes: tuple[int, ...], seed: int = 0, counting: Counting = Counting.PAIRS) -> list[Group]:
    """Return groups of random sequences, all answers of different ranks."""
    random = np.random.default_rng(seed)
    found = []
    for number, size in enumerate(sizes):
        lengths = random.integers(4, 12, size)
        sequences = tuple(TokenSequence(random.integers(3, 300, n).astype(np.int32), 2) for n in lengths)
        better, worse = pairs_of(range(1, size + 1))
        found.append(Group(sequences, better, worse, None, 0, (0, number), counting))
    return found


def stage(**changes: Any) -> RewardModelStage:
    return RewardModelStage.model_validate(LEARNS | {"budget": {"epochs": 3}} | changes)


def context_for(root: Path, **inputs: Path) -> StageContext:
    return preference_context(root, "rewardModel", (48, 16), **inputs)


def loaded(root: Path, context: StageContext, **inputs: Path) -> RewardModel:
    """Return the reward model that a stage has made."""
    reading = make_context(root / "reading", "ppo", {"reward": context.output, **inputs})
    return load_reward_model(reading, Reference(uri="reward"), torch.float32, torch.device("cpu"))


# -- the objective -----------------------------------------------------------------------------------------------------


def loss_by_hand(model: Any, found: list[Group], loss: PreferenceLoss) -> float:
    """Return the mean loss of groups: rewards by transformers' own forward pass, one sequence at a time, then loops."""

    def softplus(x: float) -> float:
        return math.log1p(math.exp(-abs(x))) + max(x, 0.0)

    def one(better: float, worse: float) -> float:
        ranked = softplus(worse - better)
        if loss.focal is None:
            return ranked
        probability = 1.0 / (1.0 + math.exp(worse - better))
        held = sum(-math.log(x + 5.0) - math.log(5.0 - x) for x in (better, worse)) / 2
        return (1.0 - 2.0 * max(0.0, probability - 0.5)) ** 2 * ranked + 0.02 * held

    each, per_prompt = [], []
    with torch.no_grad():
        for group in found:
            rewards = [
                float(model(input_ids=torch.from_numpy(item.ids).long()[None]).logits) for item in group.sequences
            ]
            losses = [one(rewards[first], rewards[second]) for first, second in combinations(range(len(rewards)), 2)]
            each += losses
            per_prompt.append(sum(losses) / math.comb(len(rewards), 2))
    return float(np.mean(per_prompt if loss.ranked else each))


@pytest.mark.parametrize("loss", [PAIR, RANKED, FOCAL], ids=["pair", "ranked", "focal"])
def test_the_loss_of_a_batch_of_ranked_answers_equals_a_loop_over_pairs(loss: PreferenceLoss) -> None:
    model = make_reward_model(make_model(300), seed=1).eval()
    found = groups((4, 2, 9, 3))
    objective = RewardObjective(loss)
    module = objective.module(model)
    total = 0.0
    targets = 0
    for part in (found[:1], found[1:]):  # a micro-batch holds whole groups, however they are dealt
        batch = objective.collate(part)
        targets += batch.num_targets
        total += float(module(batch, 1.0).detach())
    assert targets == (4 if loss.ranked else 6 + 1 + 36 + 3)
    assert total / targets == pytest.approx(loss_by_hand(model, found, loss), abs=1e-6)


@pytest.mark.parametrize("loss", [PAIR, RANKED, FOCAL], ids=["pair", "ranked", "focal"])
def test_the_fast_path_has_the_same_loss_and_gradients(loss: PreferenceLoss) -> None:
    objective = RewardObjective(loss)
    results = []
    for fast in (False, True):
        model = make_reward_model(make_model(300), seed=1)
        module = objective.module(model)
        batch = objective.collate(groups((4, 2, 3)))
        if fast:
            with accelerate(module, torch.device("cpu"), torch.float32):
                value = module(batch, 0.5)
                value.backward()
        else:
            value = module(batch, 0.5)
            value.backward()
        results.append((float(value.detach()), {name: item.grad for name, item in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_rank_without_work_adds_nothing_and_reaches_every_weight() -> None:
    model = make_reward_model(make_model(300), seed=1)
    module = RewardObjective(RANKED).module(model)
    batch = RewardObjective(RANKED).collate(())
    value = module(batch, 1.0)
    value.backward()
    assert float(value.detach()) == 0.0
    assert all(item.grad is not None and not item.grad.any() for item in model.parameters())


def test_pairs_weigh_one_each_or_one_prompt_together() -> None:
    found = groups((3, 2))
    assert collate_pairs(found, by_prompt=False).weights.tolist() == [1.0] * 4
    assert collate_pairs(found, by_prompt=True).weights.tolist() == pytest.approx([1 / 3] * 3 + [1.0])


def test_the_length_baseline_prefers_the_answer_with_more_tokens() -> None:
    def group(*lengths: int) -> Group:
        sequences = tuple(TokenSequence(np.zeros(n, np.int32), 1) for n in lengths)
        return Group(sequences, *pairs_of(range(1, len(lengths) + 1)), None, 0, (0, 0), Counting.PAIRS)

    assert length_baseline([group(5, 3)]) == 1.0
    assert length_baseline([group(3, 5), group(4, 4)]) == 0.25
    assert length_baseline([group(5, 5, 3)]) == pytest.approx(2.5 / 3)


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_separable_pairs_are_ranked_and_the_artifact_scores_as_reported(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    outcome = run(stage(), context)
    assert outcome.metrics["heldOut.toy.accuracy"] == 1.0
    assert outcome.metrics["heldOut.toy.before.accuracy"] < 1.0
    assert outcome.metrics["heldOut.toy.margin"] > 1.0
    assert outcome.metrics["heldOut.toy.loss"] < outcome.metrics["heldOut.toy.before.loss"]
    assert 0.0 <= outcome.metrics["heldOut.toy.calibrationError"] < 0.5
    assert 0.0 <= outcome.metrics["heldOut.toy.lengthBaseline"] <= 1.0
    reward = loaded(tmp_path, context)
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [({"role": "user", "content": line["prompt"]},) for line in lines]
    better = rewards_of(reward, [(prompt, line["chosen"]) for prompt, line in zip(asked, lines, strict=True)], 8)
    worse = rewards_of(reward, [(prompt, line["rejected"]) for prompt, line in zip(asked, lines, strict=True)], 8)
    margins = np.subtract(better, worse)
    assert (margins > 0).all()
    assert margins.mean() == pytest.approx(outcome.metrics["heldOut.toy.margin"], abs=1e-4)


@pytest.mark.parametrize("normalize", list(BiasOn))
def test_the_bias_makes_the_mean_reward_of_the_training_set_zero(tmp_path: Path, normalize: BiasOn) -> None:
    context = context_for(tmp_path)
    run(stage(normalizeBias=normalize.value, budget={"epochs": 1}), context)
    reward = loaded(tmp_path, context)
    assert report_of(context)["bias"] == reward.bias
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    sides = ("chosen",) if normalize is BiasOn.CHOSEN else ("chosen", "rejected")
    said = [(({"role": "user", "content": line["prompt"]},), line[side]) for line in lines for side in sides]
    mean = float(np.mean(rewards_of(reward, said, 16)))
    if normalize is BiasOn.NONE:
        assert reward.bias == 0.0
    else:
        assert reward.bias != 0.0
        assert mean == pytest.approx(0.0, abs=1e-4)


def test_an_adapter_is_saved_with_its_head_and_loads_over_its_base(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    settings = {"lora": {"rank": 4}}
    outcome = run(stage(trainable=settings, optimizer={"learningRate": 1e-2}), context)
    assert (context.output / "adapter_model.safetensors").is_file()
    assert not (context.output / "model.safetensors").exists()
    assert outcome.metrics["heldOut.toy.accuracy"] > 0.9
    reward = loaded(tmp_path, context)
    prompt = ({"role": "user", "content": "dog fox word"},)
    better, worse = rewards_of(reward, [(prompt, GOOD), (prompt, BAD)], 2)
    assert better > worse


@pytest.mark.parametrize("part", ["score", "lora_A"])
def test_an_adapter_whose_files_give_another_reward_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """What is saved is opened over its base and compared, as whole models and adapters of language models are."""

    def save_differing(model: Any, tokenizer: Any, vocabulary: Path, output: Path, card: ModelCard) -> None:
        save_adapter(model, tokenizer, vocabulary, output, card)
        weights = load_file(output / "adapter_model.safetensors")
        save_file({name: 2 * item if part in name else item for name, item in weights.items()},
                  output / "adapter_model.safetensors")  # fmt: skip

    monkeypatch.setattr(shipping, "save_adapter", save_differing)
    lora = {"trainable": {"lora": {"rank": 4}}, "optimizer": {"learningRate": 1e-1}, "budget": {"steps": 3}}
    with pytest.raises(UserError, match=r"differs from the trained one: its outputs by .*nothing is published"):
        run(stage(**lora), context_for(tmp_path))


def test_a_resumed_stage_makes_the_same_bytes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    train = write_pairs(tmp_path / "train.jsonl", 24, seed=1)
    test = write_pairs(tmp_path / "test.jsonl", 8, seed=2)
    config = stage(checkpoints={"everySteps": 2}, budget={"steps": 5}, loss={"focal": {}})
    whole = context_for(tmp_path / "whole", base=base, train=train, test=test)
    run(config, whole)
    parted = context_for(tmp_path / "parted", base=base, train=train, test=test)
    stop_and_resume(run, config, parted, at=3)
    assert content_of(parted.output) == content_of(whole.output)


def test_the_report_has_tables_by_set_and_by_domain(tmp_path: Path) -> None:
    more = write_pairs(tmp_path / "more.jsonl", 6, seed=5)
    context = context_for(tmp_path, more=more)
    sets = [
        {"name": "toy", "uri": "test", "domain": "help"},
        {"name": "more", "uri": "more", "domain": "help"},
        {"name": "plain", "uri": "more"},
    ]
    run(stage(heldOut={"sets": sets, "everySteps": 2}, budget={"steps": 4}), context)
    report = report_of(context)
    assert set(report["heldOut"]["sets"]) == {"toy", "more", "plain"}
    domains = report["heldOut"]["domains"]
    assert set(domains) == {"help", "none"}
    assert domains["help"]["pairs"] == 16 + 6
    by_set = report["heldOut"]["sets"]
    together = (16 * by_set["toy"]["accuracy"] + 6 * by_set["more"]["accuracy"]) / 22
    assert domains["help"]["accuracy"] == pytest.approx(together)
    assert domains["none"] == by_set["plain"]
    text = (context.output / "report.md").read_text(encoding="utf-8")
    assert "| held-out set | pairs | accuracy | lengthBaseline |" in text
    assert "| domain |" in text
    assert "| train | 48 | 48 | 96 | 48 |" in text


# -- domains that contradict each other --------------------------------------------------------------------------------


def conflicting(tmp_path: Path) -> dict[str, Path]:
    """Return the inputs: the same texts, with opposite preferences in two domains."""
    return {
        "base": save_base(tmp_path / "base", make_tokenizer()),
        "train": write_pairs(tmp_path / "one.jsonl", 64, seed=1),
        "other": write_pairs(tmp_path / "two.jsonl", 64, seed=1, good=BAD, bad=GOOD),
        "test": write_pairs(tmp_path / "test1.jsonl", 16, seed=2),
        "othertest": write_pairs(tmp_path / "test2.jsonl", 16, seed=2, good=BAD, bad=GOOD),
    }


def test_focal_loss_and_conditional_prompts_beat_a_joint_model_on_two_domains_that_disagree(tmp_path: Path) -> None:
    inputs = conflicting(tmp_path)
    settings: dict[str, Any] = {
        "data": [{"uri": "train", "domain": "sleep"}, {"uri": "other", "domain": "jump"}],
        "heldOut": {
            "sets": [
                {"name": "sleep", "uri": "test", "domain": "sleep"},
                {"name": "jump", "uri": "othertest", "domain": "jump"},
            ]
        },
        "budget": {"epochs": 5},
    }
    joint = run(stage(**settings, loss={"ranked": {}}), context_for(tmp_path / "joint", **inputs)).metrics
    domains = [{"name": "sleep", "system": "dog sleeps dog"}, {"name": "jump", "system": "fox jumps fox"}]
    context = context_for(tmp_path / "cool", **inputs)
    cool = run(stage(**settings, loss={"focal": {}}, domains=domains), context).metrics
    for name in ("sleep", "jump"):
        assert cool[f"heldOut.{name}.accuracy"] > 0.9
        assert cool[f"heldOut.{name}.accuracy"] > joint[f"heldOut.{name}.accuracy"]
    reward = loaded(tmp_path, context)
    asked = [(({"role": "user", "content": "word"},), answer) for answer in (GOOD, BAD)]
    for domain, sign in (("sleep", 1), ("jump", -1)):
        better, worse = rewards_of(reward, asked, 2, domain)
        assert sign * (better - worse) > 0


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_equal_answers_are_counted_and_too_many_of_them_stop_the_stage(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "train.jsonl", 19, seed=1)
    same = {"prompt": "what", "chosen": "the dog", "rejected": "the dog"}
    path.write_text(path.read_text(encoding="utf-8") + json.dumps(same) + "\n", encoding="utf-8")
    context = context_for(tmp_path, train=path)
    run(stage(budget={"steps": 1}), context)
    counts = report_of(context)["data"]["train"]
    assert (counts["sameAnswers"], counts["fewAnswers"], counts["groups"]) == (1, 1, 19)
    with pytest.raises(UserError, match=r"maxDroppedShare.*sameAnswers 1"):
        run(stage(budget={"steps": 1}, maxDroppedShare=0.01), context_for(tmp_path / "strict", train=path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": None}, "no chat template; name one"),
        ({"trainable": {"embeddings": {}}}, "head is new and must learn"),
        ({"trainable": {"lora": {"continueAdapter": True}}}, "continueAdapter"),
        ({"domains": [{"name": "a", "system": "x"}] * 2}, "two domains are named 'a'"),
        ({"domains": [{"name": "a", "system": "x"}], "data": [{"uri": "train", "domain": "b"}]}, "which has a; add"),
        ({"sequenceLength": 8}, "no preference to learn from is left"),
        ({"earlyStop": {"set": "other"}}, "earlyStop.set"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(stage(**changes), context_for(tmp_path))


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    make_tokenizer(extra=tuple(f"piece{number}" for number in range(9))).save_pretrained(base)
    with pytest.raises(UserError, match=r"the vocabulary has .* ids and the model .* rows"):
        run(stage(), context_for(tmp_path, base=base))


def test_conversations_are_no_preferences(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the dog"}]
    path.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="a conversation where preferences are expected"):
        run(stage(), context_for(tmp_path, train=path))
