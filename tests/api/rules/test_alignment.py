"""Problems of stages that learn from preferences or from a reward are reported with the field and a remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from stagecoach_api.problems import InvalidRun, Problem
from stagecoach_api.reading.validation import validate

RUN = """
apiVersion: stagecoach.dev/v1alpha1
kind: TrainingRun
metadata: {name: demo}
spec:
  storage: {uri: "s3://models/demo"}
  stages:
  - name: sft
    sft:
      model: {uri: base}
      data: [{uri: alpaca.json, format: alpaca}, {uri: ranked.json, format: ranked}]
      hindsight: {}
      template: {name: alpaca}
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-4}
  - name: reward
    rewardModel:
      model: {stage: sft}
      data: [{uri: zh.json, format: pairs, domain: zh}, {uri: en.json, format: comparison, domain: en}, {uri: c.json}]
      heldOut: {sets: [{name: zh, uri: held.json, domain: zh}]}
      domains: [{name: zh, system: helpful}, {name: en, system: harmless}]
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-5}
  - name: ppo
    ppo:
      model: {stage: sft}
      data: [{uri: prompts.json, format: messages}, {uri: zh.json, format: pairs}]
      pretraining: {data: [{uri: text.jsonl, format: text}], weight: 1}
      rewards: [{name: judge, model: {stage: reward}}]
      critic: {warmupUpdates: 3}
      policy: {miniBatchSamples: 4}
      rollout: {maxNewTokens: 64}
      sequenceLength: 128
      batch: {samples: 8}
      budget: {steps: 10}
      optimizer: {learningRate: 1.0e-6}
  - name: dpo
    dpo:
      model: {stage: sft}
      data: [{uri: zh.json, format: ranked}]
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-6}
  - name: kto
    dpo:
      model: {stage: sft}
      data: [{uri: labels.json, format: labels}, {uri: zh.json, format: comparison}, {uri: ranked.json, format: ranked}]
      loss: {kto: {}}
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-6}
  - name: score
    evaluate:
      model: {stage: ppo}
      rewards:
      - name: chat
        data: {name: chat, uri: prompts.json}
        rewards: [{name: judge, model: {stage: reward}}]
        rivals: [{name: sft, model: {stage: sft}}, {name: dpo, model: {stage: dpo}}]
      gates:
      - {metric: chat.reward, atLeast: 0}
      - {metric: chat.reward.sft, atMost: 2}
      - {metric: chat.winRate.dpo, atLeast: 0.5}
"""


def problems_of(*edits: tuple[str, Any]) -> list[Problem]:
    """Return the problems of the run after setting each `stage.field.field` to a value."""
    run = yaml.safe_load(RUN)
    for path, value in edits:
        name, *steps = path.split(".")
        here: Any = next(stage for stage in run["spec"]["stages"] if stage["name"] == name)
        here = here[next(kind for kind in here if kind != "name")]
        for step in steps[:-1]:
            here = here[int(step)] if isinstance(here, list) else here.setdefault(step, {})
        if isinstance(here, list):
            here[int(steps[-1])] = copy.deepcopy(value)
        elif value is None:
            del here[steps[-1]]
        else:
            here[steps[-1]] = copy.deepcopy(value)
    try:
        validate(run)
    except InvalidRun as error:
        return list(error.problems)
    return []


def test_a_run_of_all_alignment_stages_is_valid() -> None:
    assert problems_of() == []


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_critic_starts_from_a_reward_model_or_a_language_model(stage: str) -> None:
    assert problems_of(("ppo.critic.model", {"stage": stage})) == []


BAD: list[tuple[str, tuple[str, Any], str, tuple[str, ...]]] = [
    *(
        (
            f"a {name} stage does not learn from {layout}",
            (f"{name}.data.0.format", layout),
            f"stages.{name}.{kind}.data[0].format",
            ("do not state which answer is preferred", "(pairs, comparison, ranked)", "`sft`"),
        )
        for name, kind in (("reward", "rewardModel"), ("dpo", "dpo"), ("kto", "dpo"))
        for layout in ("text", "alpaca", "sharegpt", "messages")
    ),
    (
        "held-out sets are preferences too",
        ("reward.heldOut.sets.0.format", "text"),
        "stages.reward.rewardModel.heldOut.sets[0].format",
        ("do not state which answer is preferred",),
    ),
    (
        "a reward model does not learn from labels",
        ("reward.data.0.format", "labels"),
        "stages.reward.rewardModel.data[0].format",
        ("judge one answer each", "`loss: {kto: {}}`"),
    ),
    (
        "DPO does not learn from labels",
        ("dpo.data.0.format", "labels"),
        "stages.dpo.dpo.data[0].format",
        ("compares two answers", "set `loss: {kto: {}}`"),
    ),
    (
        "fine-tuning on ranked answers needs hindsight",
        ("sft.hindsight", None),
        "stages.sft.sft.data[1].format",
        ("several answers", "add `hindsight: {}`", "`rewardModel` or `dpo`"),
    ),
    (
        "hindsight needs ranked answers",
        ("sft.data.1.format", "labels"),
        "stages.sft.sft.data[1].format",
        ("`hindsight` needs ranked ones", "`dpo`"),
    ),
    (
        "plain text is not a prompt",
        ("ppo.data.0.format", "text"),
        "stages.ppo.ppo.data[0].format",
        ("asks nothing", "`pretraining.data`"),
    ),
    (
        "preferences are not text to predict",
        ("ppo.pretraining.data.0.format", "pairs"),
        "stages.ppo.ppo.pretraining.data[0].format",
        ("not text to predict", "give text or conversations"),
    ),
    (
        "a set's domain exists",
        ("reward.data.1.domain", "zn"),
        "stages.reward.rewardModel.data[1].domain",
        ("one of `domains`", "use one of: zh, en"),
    ),
    (
        "a held-out set's domain exists",
        ("reward.heldOut.sets.0.domain", "zn"),
        "stages.reward.rewardModel.heldOut.sets[0].domain",
        ("one of `domains`", "use one of: zh, en"),
    ),
    (
        "domains have names of their own",
        ("reward.domains", [{"name": name, "system": "s"} for name in ("zh", "en", "zh")]),
        "stages.reward.rewardModel.domains[2].name",
        ("must be unique", "rename"),
    ),
    (
        "an answer leaves room for its prompt",
        ("ppo.rollout.maxNewTokens", 128),
        "stages.ppo.ppo.rollout.maxNewTokens",
        ("below 128 (`sequenceLength`)", "shorten"),
    ),
    (
        "a policy that is not sharded generates the answers itself",
        ("ppo.rollout.wholeCopy", False),
        "stages.ppo.ppo.rollout.wholeCopy",
        ("whole on every rank", "set `sharding: {zero: 3}`"),
    ),
    (
        "vLLM generates from its own copy",
        ("ppo.rollout", {"maxNewTokens": 16, "wholeCopy": False, "engine": "vllm"}),
        "stages.ppo.ppo.rollout.wholeCopy",
        ("its own copy", "`engine: transformers`"),
    ),
    (
        "the policy learns after the critic's warm-up",
        ("ppo.critic.warmupUpdates", 10),
        "stages.ppo.ppo.critic.warmupUpdates",
        ("below 10 (`budget.steps`)", "the policy never learns"),
    ),
    (
        "a reward is not given by a policy",
        ("ppo.rewards.0.model", {"stage": "sft"}),
        "stages.ppo.ppo.rewards[0].model.stage",
        ("of kind rewardModel", "name one of reward"),
    ),
    (
        "a policy learns without dropout",
        ("ppo.attentionDropout", 0.1),
        "stages.ppo.ppo.attentionDropout",
        ("must be 0", "those at generation", "leave it out"),
    ),
    (
        "a policy's adapter learns without dropout",
        ("ppo.trainable", {"lora": {"dropout": 0.05}}),
        "stages.ppo.ppo.trainable.lora.dropout",
        ("must be 0", "those at generation", "leave it out"),
    ),
    (
        "a rival is not a reward model",
        ("score.rewards.0.rivals.0.model.stage", "reward"),
        "stages.score.evaluate.rewards[0].rivals[0].model.stage",
        ("of kind pretrain or sft or ppo or dpo or export",),
    ),
    (
        "the reference of a policy is not a reward model",
        ("dpo.reference", {"stage": "reward"}),
        "stages.dpo.dpo.reference.stage",
        ("of kind pretrain or sft or ppo or dpo or export",),
    ),
    (
        "exact match needs one correct answer",
        ("score.exactMatch", [{"name": "m", "data": {"name": "m", "uri": "m.json", "format": "pairs"}}]),
        "stages.score.evaluate.exactMatch[0]",
        ("several answers", "`rewards`"),
    ),
    (
        "a gate watches a task's reward",
        ("score.gates.0.metric", "chta.reward"),
        "stages.score.evaluate.gates[0].metric",
        ("a task in `rewards`", "did you mean `chat.reward`?"),
    ),
    (
        "a gate watches a rival's reward",
        ("score.gates.1.metric", "chat.reward.ppo"),
        "stages.score.evaluate.gates[1].metric",
        ("one of its `rivals`",),
    ),
    (
        "a gate watches the win rate over a rival",
        ("score.gates.2.metric", "chat.winRate.dpp"),
        "stages.score.evaluate.gates[2].metric",
        ("did you mean `chat.winRate.dpo`?",),
    ),
    (
        "a win rate is a share",
        ("score.gates.2.atLeast", 50),
        "stages.score.evaluate.gates[2].atLeast",
        ("a share is never above 1", "0.9 for 90 %"),
    ),
]


@pytest.mark.parametrize(("edit", "path", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_clear_problem(edit: tuple[str, Any], path: str, words: tuple[str, ...]) -> None:
    found = problems_of(edit)
    assert [problem.path for problem in found] == [path]
    assert [word for word in words if word not in str(found[0])] == []


def test_a_problem_that_is_not_certain_is_not_reported() -> None:
    assert problems_of(("reward.domains", None)) == []  # domains are then only rows of the report
    assert problems_of(("score.gates.0.metric", "other.reward"), ("score.lmEval", [{"task": "x"}])) == []
    assert problems_of(("ppo.budget", {"epochs": 1})) == []
    assert problems_of(("sft.data.1.format", "auto"), ("sft.hindsight", None)) == []


def test_a_sharded_policy_may_generate_from_its_shards() -> None:
    assert problems_of(("ppo.rollout.wholeCopy", False), ("ppo.sharding", {"zero": 3})) == []
