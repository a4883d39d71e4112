"""`evaluate`: measure a model, and stop the run where it is not good enough."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from stagecoach_api.base import Count, Identifier, Model, Uri
from stagecoach_api.conversation import Template
from stagecoach_api.generation import Generation, Samples
from stagecoach_api.references import NamedSource, Reference
from stagecoach_api.rewards import PromptNamedSource, RewardTerms
from stagecoach_api.training import Precision, require_exactly_one


class ExactMatch(Model):
    """Share of answers that equal the reference answer, after trimming blanks."""

    name: Identifier
    """The metric's name: `<name>.exactMatch`."""

    # In YAML 1.1, and so for kubectl, a bare `on` is the truth value true: outside, the field is called `data`.
    on: Annotated[NamedSource, Field(alias="data")]
    """Conversations whose last assistant turn is the reference."""

    max_samples: Count = 200
    """Conversations that are asked. Default: 200."""

    generation: Generation = Generation()
    """How the answers are generated. Default: greedy, 64 new tokens."""


class Rival(Model):
    """Another model that answers the same prompts."""

    name: Identifier
    """What the report calls it."""

    model: Reference
    """A stage's artifact or a Hugging Face folder."""


class RewardTask(Model):
    """What the model's answers are worth, and how often they beat those of other models."""

    name: Identifier
    """Metrics are `<name>.reward`, `<name>.reward.<rival>` and `<name>.winRate.<rival>` (a tie is half a win)."""

    # In YAML 1.1, and so for kubectl, a bare `on` is the truth value true: outside, the field is called `data`.
    on: Annotated[PromptNamedSource, Field(alias="data")]
    """Prompts; a last answer in them is left out."""

    max_samples: Count = 200
    """Prompts that are answered. Default: 200."""

    generation: Generation = Generation()
    """How all models answer. Default: greedy, 64 new tokens."""

    rewards: RewardTerms
    """What an answer is worth: the sum of these."""

    rivals: Annotated[tuple[Rival, ...], Field(max_length=8)] = ()
    """Models to compare with. Default: none."""


class LmEvalTask(Model):
    """A task of the LM evaluation harness. Exactly one of `task` and `uri`."""

    task: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Name of one of lm-eval's own tasks. None: `uri` is given."""

    uri: Uri | None = None
    """A task in lm-eval's YAML. None: `task` is given."""

    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Examples in front of each question. None: the task's own number."""

    max_samples: Count | None = None
    """Questions asked. None: all."""

    @model_validator(mode="after")
    def _one(self) -> LmEvalTask:
        require_exactly_one(self, "task", "uri")
        return self


class GateFailure(StrEnum):
    """What a missed gate does to the run."""

    STOP = "stop"
    CONTINUE = "continue"


class Gate(Model):
    """A condition on one metric of the report."""

    metric: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of a metric in `report.json`, such as `heldOut.zh.bitsPerCharacter` or `verse.exactMatch`."""

    at_least: float | None = None
    """The metric must not be lower. None: no lower limit."""

    at_most: float | None = None
    """The metric must not be higher. None: no upper limit."""

    on_failure: GateFailure = GateFailure.STOP
    """`stop` fails the stage and with it the run; `continue` records the miss and goes on. Default: stop."""

    @model_validator(mode="after")
    def _limits(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give `atLeast`, `atMost` or both")
        return self


class EvaluateStage(Model):
    """Measure a model."""

    model: Reference
    """Model or adapter to measure: a stage's artifact or a Hugging Face folder."""

    held_out: Annotated[tuple[NamedSource, ...], Field(max_length=32)] = ()
    """Text whose loss, perplexity and bits per character are measured. Default: none."""

    max_tokens: Count = 65536
    """Tokens measured per held-out set. Default: 65,536."""

    sequence_length: Annotated[int, Field(ge=8, le=1 << 24)] = 1024
    """Tokens of one row while measuring. Default: 1,024."""

    samples: Samples | None = None
    """Prompts whose answers are shown. None: none are."""

    exact_match: Annotated[tuple[ExactMatch, ...], Field(max_length=32)] = ()
    """Tasks with one right answer. Default: none."""

    rewards: Annotated[tuple[RewardTask, ...], Field(max_length=8)] = ()
    """Comparisons by reward. Default: none."""

    lm_eval: Annotated[tuple[LmEvalTask, ...], Field(max_length=64)] = ()
    """Tasks of the LM evaluation harness. Default: none."""

    template: Template | None = None
    """Template of prompts. None: the tokenizer's own chat template."""

    gates: Annotated[tuple[Gate, ...], Field(max_length=32)] = ()
    """Conditions on the metrics. Default: none."""

    precision: Precision = Precision.BF16
    """Number format of the forward pass. Default: bf16."""

    batch_rows: Annotated[int, Field(ge=1, le=65536)] = 8
    """Rows computed at once. Default: 8."""
