"""`pretrain`: next-token training on text, from scratch or from an existing model."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Count, Identifier, Model, Weight
from stagecoach_api.constraints import Constraint, divisible, exactly_one, given, implies
from stagecoach_api.draft import Draft, Fault, configs, repeated_names
from stagecoach_api.problems import suggest
from stagecoach_api.references import ArtifactType, Reference
from stagecoach_api.rules.training import batch_too_small
from stagecoach_api.stage_kind import Ranks, StageKind, reads
from stagecoach_api.summary_tables import HELD_OUT_TABLES
from stagecoach_api.training import Span, TextTraining


class Architecture(Model):
    """A new LLaMA decoder (`LlamaConfig` in transformers). Its vocabulary size is the tokenizer's."""

    constraints = (
        Constraint(
            divisible("hidden_size", "num_heads"),
            "`hiddenSize` must be divisible by `numHeads`",
            "change one of them",
        ),
        Constraint(
            implies(given("num_key_value_heads"), divisible("num_heads", "num_key_value_heads")),
            "`numHeads` must be divisible by `numKeyValueHeads`",
            "change one of them",
        ),
    )

    hidden_size: Annotated[int, Field(ge=8, le=65536)]
    """Width D of the residual stream."""

    intermediate_size: Annotated[int, Field(ge=8, le=1 << 20)]
    """Width of the SwiGLU feed-forward layer."""

    num_layers: Annotated[int, Field(ge=1, le=1024)]
    """Number of decoder blocks."""

    num_heads: Annotated[int, Field(ge=1, le=1024)]
    """Number of attention heads. Must divide `hiddenSize`."""

    num_key_value_heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of key and value heads (grouped-query attention). Must divide `numHeads`. If unset: `numHeads`."""

    max_position_embeddings: Annotated[int, Field(ge=8, le=1 << 24)] = 2048
    """Longest context stated in the model's configuration."""

    rope_theta: Annotated[float, Field(ge=1.0, le=1e12)] = 10000.0
    """Base of the rotary position embedding."""

    norm_epsilon: Annotated[float, Field(ge=1e-12, le=1e-2)] = 1e-5
    """Epsilon of RMSNorm."""

    initializer_range: Annotated[float, Field(ge=0.0, le=1.0)] = 0.02
    """Standard deviation of new weights."""

    tie_embeddings: bool = False
    """Share the input embedding's matrix with the head."""


class RopeScalingName(StrEnum):
    """Ways to extend rotary positions beyond the trained context."""

    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"


class RopeScaling(Model):
    """Scaling of rotary positions (InternLM2 reads 200K tokens after training at 32K)."""

    name: RopeScalingName
    """Method: `linear`, `dynamic` or `yarn`, as in transformers."""

    factor: Annotated[float, Field(ge=1.0, le=1e4)]
    """Factor by which the context grows."""


class DataWeight(Model):
    """Weight of one data set in a phase."""

    name: Identifier
    """Name of the set in `data`."""

    weight: Weight
    """Share of the phase's tokens, relative to the other weights. 0 leaves the set out."""


class Phase(Model):
    """A part of training with settings of its own. Unset fields are taken from the stage."""

    name: Identifier
    """Name of the phase in progress and reports."""

    tokens: Count
    """Number of training tokens of this phase."""

    sequence_length: Annotated[int, Field(ge=8, le=1 << 24)] | None = None
    """Tokens of one row. If unset: the stage's."""

    batch_tokens: Count | None = None
    """Tokens of one optimiser step over all ranks. If unset: the stage's `batch`."""

    learning_rate: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    """Highest learning rate. If set, the phase has a whole schedule of its own. If unset: the stage's schedule
    continues across phases."""

    weights: Annotated[tuple[DataWeight, ...], Field(max_length=64)] = ()
    """Weights of the data sets in this phase. If empty, the weights in `data` apply."""

    rope_theta: Annotated[float, Field(ge=1.0, le=1e12)] | None = None
    """Base of the rotary position embedding from this phase on (InternLM2: 50,000, then 1,000,000). If unset: that of
    the previous phase."""


class PretrainStage(TextTraining):
    """Train on the next token of text."""

    constraints = (
        exactly_one("model", "architecture"),
        Constraint(
            implies(given("architecture"), given("tokenizer")),
            "`architecture` needs a `tokenizer`, which determines the size of the vocabulary",
            "give one",
        ),
    )

    model: Reference | None = None
    """Model to continue from: a stage's artifact or a Hugging Face folder (safetensors only). If unset: `architecture`
    is set."""

    architecture: Architecture | None = None
    """Shape of a new model to start from. If unset: `model` is set."""

    rope_theta: Annotated[float, Field(ge=1.0, le=1e12)] | None = None
    """New base of the rotary position embedding. If unset: the model's own."""

    rope_scaling: RopeScaling | None = None
    """Scaling of rotary positions. If unset: the model's own."""

    phases: Annotated[tuple[Phase, ...], Field(max_length=32)] = ()
    """Parts of training, in order. Their tokens replace `budget`. If empty, there is one phase with the stage's
    settings and `budget`."""

    def spans(self) -> tuple[Span, ...]:
        phases = tuple(
            Span(
                ("phases", number, "tokens"),
                phase.tokens,
                phase.batch_tokens or self.batch.tokens,
                phase.sequence_length or self.sequence_length,
            )
            for number, phase in enumerate(self.phases)
        )
        return phases or super().spans()


# -- rules -------------------------------------------------------------------------------------------------------------


def some_weight_of_each_phase_is_above_zero(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        for number, phase in enumerate(config.phases):
            if phase.weights and all(share.weight == 0 for share in phase.weights):
                yield Fault(
                    stage.at("phases", number, "weights"),
                    phase.name,
                    "all weights of the phase are 0",
                    "give one a weight above 0",
                )


def phases_weigh_sets_that_exist(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        known = [source.label for source in config.data]
        for number, phase in enumerate(config.phases):
            seen: set[str] = set()
            for index, share in enumerate(phase.weights):
                path = stage.at("phases", number, "weights", index, "name")
                if share.name not in known:
                    yield Fault(path, share.name, "must be the name of a set in `data`", suggest(share.name, known))
                if share.name in seen:
                    yield Fault(path, share.name, "must be named once in a phase", "remove one of the two weights")
                seen.add(share.name)


def phase_names_are_unique(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        yield from repeated_names(stage.at("phases"), [phase.name for phase in config.phases])


def a_phases_batch_holds_a_whole_row(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        for number, (phase, span) in enumerate(zip(config.phases, config.spans(), strict=False)):
            if phase.batch_tokens is None and phase.sequence_length is None:
                continue  # the stage's own, which are checked there
            if span.batch_tokens is not None and span.batch_tokens < span.sequence_length:
                field = "batchTokens" if phase.batch_tokens is not None else "sequenceLength"
                yield batch_too_small(stage.at("phases", number, field), span.batch_tokens, span.sequence_length)


def phases_are_the_budget(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        default = PretrainStage.model_fields["budget"].default
        if not config.phases or config.budget == default:
            continue
        total = sum(phase.tokens for phase in config.phases)
        if config.budget.tokens != total:
            yield Fault(
                stage.at("budget"),
                config.budget.model_dump(exclude_none=True),
                f"the phases are the budget, and they add up to {total:,} tokens",
                "remove `budget`",
            )


def rows_fit_the_context_of_the_architecture(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        if config.architecture is None:
            continue
        limit = config.architecture.max_position_embeddings
        lengths = [(stage.at("sequenceLength"), config.sequence_length)]
        lengths += [
            (stage.at("phases", number, "sequenceLength"), phase.sequence_length)
            for number, phase in enumerate(config.phases)
            if phase.sequence_length is not None
        ]
        for path, length in lengths:
            if length > limit:
                yield Fault(
                    path,
                    length,
                    f"must be at most {limit:,}, `architecture.maxPositionEmbeddings`",
                    "shorten the rows, or raise that limit",
                )


KIND = StageKind(
    name="pretrain",
    position=30,
    summary="Train on the next token of text.",
    config=PretrainStage,
    makes=ArtifactType.MODEL,
    reads={
        "model": reads(ArtifactType.MODEL),
        "tokenizer": reads(ArtifactType.VOCABULARY, ArtifactType.MODEL),
    },
    ranks=Ranks.ALL,
    heavy=True,
    tables=HELD_OUT_TABLES,
    rules=(
        some_weight_of_each_phase_is_above_zero,
        phases_weigh_sets_that_exist,
        phase_names_are_unique,
        a_phases_batch_holds_a_whole_row,
        phases_are_the_budget,
        rows_fit_the_context_of_the_architecture,
    ),
)
