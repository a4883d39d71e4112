"""Fields that every kind of training stage shares: what is trained, for how long, with which step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Annotated, ClassVar

from pydantic import Field

from stagecoach_api.base import Count, Fraction, Identifier, Model, NonNegativeCount
from stagecoach_api.constraints import Constraint, at_least, equals, exactly_one, implies
from stagecoach_api.fields import FieldPath
from stagecoach_api.references import NamedSource, Reference, WeightedSource
from stagecoach_api.stage_kind import StageConfig

# -- what is trained ---------------------------------------------------------------------------------------------------


class FullTraining(Model):
    """Every parameter is trained."""


class Rows(StrEnum):
    """Rows of the embedding and of the head."""

    ALL = "all"
    NEW = "new"


class EmbeddingTraining(Model):
    """Only the input embedding and the head are trained; the body is frozen."""

    rows: Rows = Rows.NEW
    """`new`: only the rows the vocabulary resize added (old rows stay bit for bit); `all`: every row, as
    Chinese-LLaMA's first stage did (arXiv 2304.08177). Default: new."""


ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


class LoraTraining(Model):
    """Low-rank adapters (arXiv 2106.09685) on the named linear layers."""

    targets: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=64)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers that get an adapter. Default: all seven of a LLaMA block."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank of each adapter. Default: 8."""

    alpha: Annotated[float, Field(ge=0.0, le=1e6)] = 16.0
    """Scale: the adapter's output is multiplied by alpha / rank. Default: 16."""

    dropout: Fraction = 0.0
    """Dropout probability in front of the adapter. Default: 0."""

    modules_to_save: Annotated[tuple[ModuleName, ...], Field(max_length=16)] = ()
    """Layers trained in full beside the adapters, all their rows, such as `embed_tokens` and `lm_head`.
    Default: none."""

    new_rows: bool = False
    """Train the rows the vocabulary resize added, beside the adapters. Default: false."""

    continue_adapter: bool = False
    """Go on training the adapter that `model` is, instead of merging it into the base in memory and starting a new
    one. `targets`, `rank` and `alpha` are then the adapter's. Default: false."""


class Trainable(Model):
    """Which parameters learn. Exactly one member."""

    constraints = (exactly_one("full", "embeddings", "lora"),)

    full: FullTraining | None = None
    """Every parameter. If unset: another member is given."""

    embeddings: EmbeddingTraining | None = None
    """Input embedding and head only. If unset: another member is given."""

    lora: LoraTraining | None = None
    """Low-rank adapters. If unset: another member is given."""


class NewRows(StrEnum):
    """What a row added by a vocabulary resize starts as."""

    MEAN = "mean"
    RANDOM = "random"
    ZERO = "zero"


class Resize(Model):
    """How the embedding and the head grow when the vocabulary is larger than the model's."""

    new_rows: NewRows = NewRows.MEAN
    """`mean`: the mean of the rows of the old vocabulary's sub-tokens of the new piece (as Ziya2 did, arXiv
    2311.03301); `random`: normal with the model's initializer range; `zero`. Default: mean."""


# -- for how long ------------------------------------------------------------------------------------------------------


class Budget(Model):
    """How long training lasts. Exactly one member."""

    constraints = (exactly_one("tokens", "steps", "epochs"),)

    tokens: Count | None = None
    """Training tokens, counted as they enter the model, padding apart. If unset: another member is given."""

    steps: Count | None = None
    """Optimiser steps. If unset: another member is given."""

    epochs: Annotated[float, Field(ge=0.001, le=10000.0)] | None = None
    """Passes over the data. If unset: another member is given."""


class Batch(Model):
    """The global batch of one optimiser step. It never depends on the number of ranks. `tokens` or `samples`, one."""

    constraints = (exactly_one("tokens", "samples"),)

    tokens: Count | None = None
    """Tokens of one optimiser step over all ranks: `tokens / sequenceLength` rows, rounded down, at least one.
    If unset: `samples` is given."""

    samples: Count | None = None
    """Samples of one optimiser step over all ranks, packed into as few rows as they fit. If unset: `tokens` is
    given."""

    micro_batch_rows: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Rows of `sequenceLength` tokens that one rank computes at once; the rest of its share of the batch is
    accumulated. If unset: 1."""


class ScheduleName(StrEnum):
    """Shape of the learning rate over the steps after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    WSD = "wsd"


class Schedule(Model):
    """Learning rate over time: a linear warm-up from 0, then the named shape."""

    name: ScheduleName = ScheduleName.COSINE
    """`cosine` and `linear` fall to the floor at the last step; `constant` stays; `wsd` stays, then falls linearly to
    the floor over the last `decayShare` of the steps (arXiv 2404.06395). Default: cosine."""

    warmup_steps: NonNegativeCount | None = None
    """Steps of the warm-up. If unset: `warmupShare` decides."""

    warmup_share: Fraction = 0.0
    """Share of all steps spent in the warm-up. Default: 0. Ignored where `warmupSteps` is given."""

    floor: Fraction = 0.0
    """Learning rate at the end as a share of the highest. Default: 0. InstructGPT and InternLM2: 0.1."""

    decay_share: Fraction = 0.1
    """`wsd` only: share of all steps over which the rate falls. Default: 0.1."""


class Optimizer(Model):
    """AdamW (arXiv 1711.05101) with fp32 master weights and moments."""

    learning_rate: Annotated[float, Field(ge=0.0, le=10.0)]
    """Highest learning rate."""

    beta1: Fraction = 0.9
    """Decay of the first moment. Default: 0.9."""

    beta2: Fraction = 0.95
    """Decay of the second moment. Default: 0.95 (InternLM2, Ziya2)."""

    epsilon: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-8
    """Added to the square root of the second moment. Default: 1e-8."""

    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) are never decayed. Default: 0."""

    clip: Annotated[float, Field(ge=0.0, le=1e6)] | None = 1.0
    """Largest global gradient norm; above it gradients are scaled down. Default: 1. If unset: no clipping."""


class EarlyStop(Model):
    """End training when a held-out loss has stopped falling."""

    set: Identifier
    """Name of the held-out set that is watched."""

    patience: Annotated[int, Field(ge=1, le=10000)] = 3
    """Measurements in a row without improvement before training ends. Default: 3."""

    min_delta: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Smallest fall of the loss, in nats per token, that counts as improvement. Default: 0."""


# -- with which step ---------------------------------------------------------------------------------------------------


class Precision(StrEnum):
    """Number format of the forward and backward pass; master weights and moments are fp32 always."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Offload(StrEnum):
    """Where DeepSpeed keeps a state between steps."""

    NONE = "none"
    CPU = "cpu"


class Sharding(Model):
    """DeepSpeed ZeRO (arXiv 1910.02054). At one rank without offload the plain PyTorch step is used instead."""

    constraints = (
        Constraint(
            implies(equals("offload_optimizer", "cpu"), at_least("zero", 1)),
            "`offloadOptimizer: cpu` needs `zero` of 1 or more",
            "raise it, or leave the offload out",
        ),
        Constraint(
            implies(equals("offload_parameters", "cpu"), at_least("zero", 3)),
            "`offloadParameters: cpu` needs `zero: 3`",
            "raise it, or leave the offload out",
        ),
    )

    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage: 0 replicates, 1 shards the optimiser state, 2 gradients too, 3 parameters too. Default: 0."""

    offload_optimizer: Offload = Offload.NONE
    """Where the optimiser state lies; `cpu` needs `zero` ≥ 1. Default: none."""

    offload_parameters: Offload = Offload.NONE
    """Where the parameters lie; `cpu` needs `zero: 3`. Default: none."""


class Checkpoints(Model):
    """When the whole training state is saved, and which saves are kept until the stage is done."""

    every_steps: Count | None = None
    """Steps between two checkpoints. If unset: every tenth of the stage."""

    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    """Newest checkpoints that are kept. Default: 2."""

    keep_every_steps: Count | None = None
    """Checkpoints at multiples of this step are kept beside the newest. If unset: none are."""


class HeldOut(Model):
    """Measurement on held-out text, by the training stage itself."""

    sets: Annotated[tuple[NamedSource, ...], Field(max_length=16)] = ()
    """Sets whose loss, bits per character and perplexity are measured. Default: none."""

    every_steps: Count | None = None
    """Steps between two measurements. If unset: before the first step and after the last only."""

    max_tokens: Count = 65536
    """Tokens measured per set, from the first record on. Default: 65,536."""


@dataclass(frozen=True)
class Span:
    """A part of training with one batch size and one row length. Not part of the API."""

    path: FieldPath
    """Path of `tokens` below the configuration."""
    tokens: int | None
    """Training tokens; None if the budget is not in tokens."""
    batch_tokens: int | None
    """Tokens of one optimiser step; None if the batch is in samples."""
    sequence_length: int

    @property
    def num_steps(self) -> int | None:
        """Return the optimiser steps, each of as many whole rows as fit the batch, at least one; None if unknown."""
        if self.tokens is None or self.batch_tokens is None:
            return None
        return ceil(self.tokens / (max(1, self.batch_tokens // self.sequence_length) * self.sequence_length))


class Training(StageConfig):
    """What all kinds of training have in common: the data, what learns, for how long, with which step."""

    data: Annotated[tuple[WeightedSource, ...], Field(min_length=1, max_length=64)]
    """Sets to train on, mixed exactly by weight."""

    trainable: Trainable = Trainable(full=FullTraining())
    """Which parameters learn. Default: all."""

    sequence_length: Annotated[int, Field(ge=8, le=1 << 24)] = 1024
    """Tokens of one row. Default: 1,024."""

    budget: Budget = Budget(epochs=1.0)
    """How long training lasts. Default: one epoch."""

    batch: Batch
    """Global batch of one optimiser step."""

    optimizer: Optimizer
    """AdamW's settings."""

    schedule: Schedule = Schedule()
    """Learning rate over time. Default: cosine to 0 without warm-up."""

    precision: Precision = Precision.BF16
    """Number format of forward and backward. Default: bf16."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them. Default: false."""

    sharding: Sharding = Sharding()
    """ZeRO stage and offload. Default: none of either."""

    checkpoints: Checkpoints = Checkpoints()
    """When the training state is saved. Default: ten times, and the newest two are kept."""

    max_dropped_share: Fraction = 0.05
    """Largest share of samples that may be dropped, cut or left without any loss; above it the stage fails.
    Default: 0.05."""

    attention_dropout: Fraction = 0.0
    """Dropout probability of the attention weights while training. Default: 0."""

    trains: ClassVar[bool] = True

    @property
    def offloads(self) -> bool:
        return Offload.CPU in (self.sharding.offload_optimizer, self.sharding.offload_parameters)

    def spans(self) -> tuple[Span, ...]:
        """Return the parts of training in order."""
        return (Span(("budget", "tokens"), self.budget.tokens, self.batch.tokens, self.sequence_length),)

    def planned_tokens(self) -> int | None:
        tokens = [span.tokens for span in self.spans() if span.tokens is not None]
        if tokens:
            return sum(tokens)
        steps, batch = self.budget.steps, self.batch.tokens
        return steps * batch if steps is not None and batch is not None else None

    def most_steps(self) -> int | None:
        """Return the most optimiser steps the budget can mean; None if that depends on the data."""
        spans = self.spans()
        if any(span.tokens is None for span in spans):
            return self.budget.steps
        steps = [span.num_steps for span in spans if span.num_steps is not None]
        return sum(steps) if len(steps) == len(spans) else None


class MeasuredTraining(Training):
    """Training that measures held-out sets as it goes, and may end by what it finds."""

    held_out: HeldOut = HeldOut()
    """Measurement before, during and after training. Default: none."""

    early_stop: EarlyStop | None = None
    """End when a held-out loss no longer falls. If unset: the budget alone ends training."""


class TextTraining(MeasuredTraining):
    """What `pretrain` and `sft` have in common: they may grow the vocabulary."""

    tokenizer: Reference | None = None
    """Vocabulary: a `tokenizer` artifact or a Hugging Face folder. If unset: the model's own."""

    resize: Resize = Resize()
    """What new rows start as where the vocabulary is larger than the model's. Default: the mean of old rows."""
