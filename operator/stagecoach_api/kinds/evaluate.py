"""`evaluate`: measure a model, and stop the run if it is not good enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Count, Fraction, Identifier, Model, Uri
from stagecoach_api.constraints import Constraint, either, equals, exactly_one, given, implies
from stagecoach_api.conversation import Template
from stagecoach_api.draft import Draft, Fault, configs, repeated_names
from stagecoach_api.generation import Generation, Samples
from stagecoach_api.problems import suggest
from stagecoach_api.references import PREFERENCE_FORMATS, ArtifactType, Format, NamedSource, Reference
from stagecoach_api.rewards import PromptNamedSource, RewardTerms
from stagecoach_api.stage_kind import StageConfig, StageKind, reads
from stagecoach_api.summary_tables import MetricTable
from stagecoach_api.training import Precision


class ExactMatch(Model):
    """Share of answers that equal the reference answer, with both ends trimmed."""

    name: Identifier
    """Name of the task; the metric is `<name>.exactMatch`."""

    # In YAML 1.1, and so for kubectl, a bare `on` is the boolean true: in YAML the field is called `data`.
    on: Annotated[NamedSource, Field(alias="data")]
    """Conversations whose last assistant turn is the reference answer."""

    max_samples: Count = 200
    """Number of conversations to evaluate."""

    generation: Generation = Generation()
    """How the answers are generated."""


class Rival(Model):
    """Another model that answers the same prompts."""

    name: Identifier
    """Name of the model in the report."""

    model: Reference
    """Stage's artifact or Hugging Face folder."""


class RewardTask(Model):
    """Reward of the model's answers, and how often they beat the answers of other models."""

    name: Identifier
    """Name of the task. Its metrics are `<name>.reward`, `<name>.reward.<rival>` and `<name>.winRate.<rival>` (a tie
    counts as half a win)."""

    # In YAML 1.1, and so for kubectl, a bare `on` is the boolean true: in YAML the field is called `data`.
    on: Annotated[PromptNamedSource, Field(alias="data")]
    """Prompts; a last answer in them is ignored."""

    max_samples: Count = 200
    """Number of prompts to evaluate."""

    generation: Generation = Generation()
    """How all models generate their answers."""

    rewards: RewardTerms
    """Terms of the reward; their sum is the value of an answer."""

    rivals: Annotated[tuple[Rival, ...], Field(max_length=8)] = ()
    """Models to compare with."""


class LmEvalTask(Model):
    """A task of the LM evaluation harness. Exactly one of `task` and `uri` must be set."""

    constraints = (
        exactly_one("task", "uri"),
        Constraint(
            implies(equals("online", True), given("task")),
            "a task in `uri` reads the data next to it and downloads nothing",
            "leave `online` out, or name a task of lm-eval in `task`",
        ),
    )
    input_file = "uri"

    task: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Name of a task that lm-eval includes. Its data set is on the Hugging Face Hub: set `online`, or provide a cache
    of the Hub's libraries in the stage's home folder. If unset: `uri` is set."""

    uri: Uri | None = None
    """File with a task in lm-eval's YAML, or a folder with that file and the data it names. If unset: `task` is set."""

    online: bool = False
    """Download the data set of `task` from the Hugging Face Hub. The trainer's image forbids it otherwise
    (`HF_HUB_OFFLINE=1`), so that a stage depends on its inputs alone: the data is not part of the stage's digest, and
    its pods need access to huggingface.co."""

    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Number of examples before each question. If unset: the task's own number."""

    max_samples: Count | None = None
    """Number of questions to evaluate. If unset: all."""


class GateFailure(StrEnum):
    """What a missed gate does to the run."""

    STOP = "stop"
    CONTINUE = "continue"


class Gate(Model):
    """A condition on one metric of the report."""

    constraints = (
        Constraint(
            either(given("at_least"), given("at_most")), "a gate needs a limit", "give `atLeast`, `atMost` or both"
        ),
    )

    metric: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of a metric in `report.json`, such as `heldOut.zh.bitsPerCharacter` or `verse.exactMatch`."""

    at_least: float | None = None
    """The metric must not be lower. If unset: no lower limit."""

    at_most: float | None = None
    """The metric must not be higher. If unset: no upper limit."""

    on_failure: GateFailure = GateFailure.STOP
    """`stop` fails the stage and with it the run. `continue` only records that the gate was missed."""


class EvaluateStage(StageConfig):
    """Measure a model and stop the run if it is not good enough."""

    model: Reference
    """Model or adapter to measure: a stage's artifact or a Hugging Face folder."""

    held_out: Annotated[tuple[NamedSource, ...], Field(max_length=32)] = ()
    """Text whose loss, perplexity and bits per character are measured."""

    max_tokens: Count = 65536
    """Tokens measured per held-out set."""

    sequence_length: Annotated[int, Field(ge=8, le=1 << 24)] = 1024
    """Tokens of one row in measurements."""

    max_dropped_share: Fraction = 0.05
    """Largest share of a held-out set's conversations that may be left out because they are longer than
    `sequenceLength` or carry no loss. Above it the stage fails, since the figures would not be the set's."""

    samples: Samples | None = None
    """Prompts whose answers are shown in the report. If unset: none."""

    exact_match: Annotated[tuple[ExactMatch, ...], Field(max_length=32)] = ()
    """Tasks with one correct answer."""

    rewards: Annotated[tuple[RewardTask, ...], Field(max_length=8)] = ()
    """Comparisons by reward."""

    lm_eval: Annotated[tuple[LmEvalTask, ...], Field(max_length=64)] = ()
    """Tasks of the LM evaluation harness."""

    template: Template | None = None
    """How prompts are rendered as text. If unset: the chat template of the model's tokenizer."""

    gates: Annotated[tuple[Gate, ...], Field(max_length=32)] = ()
    """Conditions on the metrics."""

    precision: Precision = Precision.BF16
    """Number format of the forward pass."""

    batch_rows: Annotated[int, Field(ge=1, le=65536)] = 8
    """Rows computed at once."""

    @property
    def downloads(self) -> bool:
        return any(task.online for task in self.lm_eval)


# -- rules -------------------------------------------------------------------------------------------------------------

_REWARD_METRIC = re.compile(r".\.reward$|.\.(reward|winRate)\..")


def an_evaluation_measures_something(draft: Draft) -> Iterator[Fault]:
    measured = "give one of `heldOut`, `exactMatch`, `rewards`, `samples`, `lmEval`"
    for stage, config in configs(draft, EvaluateStage):
        if not (config.held_out or config.samples or config.exact_match or config.rewards or config.lm_eval):
            yield Fault(stage.at(), [], "measures nothing", measured)


def exact_match_names_are_unique(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, EvaluateStage):
        yield from repeated_names(stage.at("exactMatch"), [task.name for task in config.exact_match])


def names_of_reward_tasks_are_unique(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, EvaluateStage):
        yield from repeated_names(stage.at("rewards"), [task.name for task in config.rewards])
        for index, task in enumerate(config.rewards):
            yield from repeated_names(stage.at("rewards", index, "rivals"), [rival.name for rival in task.rivals])


def exact_match_reads_conversations(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, EvaluateStage):
        for index, task in enumerate(config.exact_match):
            if task.on.format is Format.TEXT:
                yield Fault(
                    stage.at("exactMatch", index),
                    task.name,
                    "plain text has no answers to compare with",
                    "give conversations (alpaca, sharegpt, messages)",
                )
            elif task.on.format in PREFERENCE_FORMATS:
                yield Fault(
                    stage.at("exactMatch", index),
                    task.name,
                    "preferences have several answers, none of them the only correct one",
                    "give conversations (alpaca, sharegpt, messages), or compare answers in `rewards`",
                )


def gates_watch_measured_metrics(draft: Draft) -> Iterator[Fault]:
    """Unknown metrics are reported only if that is certain: lm-eval names its own metrics."""
    for stage, config in configs(draft, EvaluateStage):
        sets = [f"heldOut.{source.name}." for source in config.held_out]
        tasks = [f"{task.name}.exactMatch" for task in config.exact_match]
        rewards = list(_reward_metrics(config))
        for index, gate in enumerate(config.gates):
            path, metric = stage.at("gates", index, "metric"), gate.metric
            if metric.startswith("heldOut.") and not any(metric.startswith(name) for name in sets):
                known = [source.name for source in config.held_out]
                yield Fault(
                    path, metric, "must name a set in `heldOut`", suggest(metric.split(".")[1] or metric, known)
                )
            elif metric.endswith(".exactMatch") and not config.lm_eval and metric not in tasks:
                yield Fault(path, metric, "must name a task in `exactMatch`", suggest(metric, tasks))
            elif _REWARD_METRIC.search(metric) and not config.lm_eval and metric not in [*tasks, *rewards]:
                rule = "must be the reward of a task in `rewards`, or of one of its `rivals`, or the win rate over one"
                yield Fault(path, metric, rule, suggest(metric, rewards))
            elif not (sets or tasks or rewards or config.lm_eval):
                yield Fault(
                    path, metric, "the stage measures nothing with such a name", "measure it, or remove the gate"
                )


def _reward_metrics(config: EvaluateStage) -> Iterator[str]:
    for task in config.rewards:
        yield f"{task.name}.reward"
        for rival in task.rivals:
            yield f"{task.name}.reward.{rival.name}"
            yield f"{task.name}.winRate.{rival.name}"


def gates_can_be_passed(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, EvaluateStage):
        win_rates = {metric for metric in _reward_metrics(config) if ".winRate." in metric}
        for index, gate in enumerate(config.gates):
            path = stage.at("gates", index)
            if gate.at_least is not None and gate.at_most is not None and gate.at_least > gate.at_most:
                limits = {"atLeast": gate.at_least, "atMost": gate.at_most}
                yield Fault(path, limits, "`atLeast` must not be above `atMost`", "swap them, or change one")
            is_share = gate.metric.endswith(".exactMatch") or gate.metric in win_rates
            if is_share and gate.at_least is not None and gate.at_least > 1.0:
                yield Fault((*path, "atLeast"), gate.at_least, "a share is never above 1", "write 0.9 for 90 %")


KIND = StageKind(
    name="evaluate",
    position=80,
    summary="Measure a model.",
    config=EvaluateStage,
    makes=ArtifactType.REPORT,
    reads={
        "model": reads(ArtifactType.MODEL),
        "rewards.rewards.model": reads(ArtifactType.REWARD_MODEL),
        "rewards.rivals.model": reads(ArtifactType.MODEL),
    },
    heavy=True,
    tables=(MetricTable("Evaluation"),),
    rules=(
        an_evaluation_measures_something,
        exact_match_names_are_unique,
        names_of_reward_tasks_are_unique,
        exact_match_reads_conversations,
        gates_watch_measured_metrics,
        gates_can_be_passed,
    ),
)
