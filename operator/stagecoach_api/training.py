"""Fields that all kinds of training share: what is trained, for how long, with which optimiser step."""

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
    """Train every parameter."""


class Rows(StrEnum):
    """Rows of the embedding and of the head."""

    ALL = "all"
    NEW = "new"


class EmbeddingTraining(Model):
    """Train the input embedding and the head only; the body is frozen."""

    rows: Rows = Rows.NEW
    """Rows to train. `new`: only the rows added by the vocabulary resize; the other rows do not change by a bit. `all`:
    every row, as in the first stage of Chinese-LLaMA (arXiv 2304.08177)."""


ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


ALL_LINEAR = "all-linear"
"""PEFT's name for all linear layers but the head."""


class Experts(StrEnum):
    """What happens to experts whose weights are one parameter for all of them, so that no layer can be named."""

    ADAPT = "adapt"
    FREEZE = "freeze"


class LoraTraining(Model):
    """Train low-rank adapters (arXiv 2106.09685) on linear layers."""

    targets: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=64)] = (ALL_LINEAR,)
    """Names of the linear layers that get an adapter, such as `q_proj`. `all-linear` (PEFT's term): all linear layers
    of the model's blocks, whatever their names, and not the head. The report states which share of the blocks'
    parameters the adapters reach."""

    experts: Experts | None = None
    """Experts of a mixture whose weights are one parameter for all of them, such as Mixtral's. `adapt`: they get
    adapters too (PEFT's `target_parameters`), which needs a `dropout` of 0. `freeze`: they stay as they are. If unset:
    they stay as they are if `targets` names layers, and are refused with `all-linear`, because they are most of the
    model."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank of each adapter."""

    alpha: Annotated[float, Field(ge=0.0, le=1e6)] = 16.0
    """Scale: an adapter's output is multiplied by alpha / rank."""

    dropout: Fraction = 0.0
    """Dropout probability of an adapter's input."""

    modules_to_save: Annotated[tuple[ModuleName, ...], Field(max_length=16)] = ()
    """Layers trained in full next to the adapters, all their rows, such as `embed_tokens` and `lm_head`."""

    new_rows: bool = False
    """Also train the rows added by the vocabulary resize."""

    continue_adapter: bool = False
    """Continue training the adapter that `model` is. False merges it into its base in memory and starts a new adapter.
    If true, `targets`, `rank` and `alpha` are those of the existing adapter."""


class Trainable(Model):
    """The parameters that are trained. Exactly one member must be set."""

    constraints = (exactly_one("full", "embeddings", "lora"),)

    full: FullTraining | None = None
    """Train every parameter. If unset: another member is set."""

    embeddings: EmbeddingTraining | None = None
    """Train the input embedding and the head only. If unset: another member is set."""

    lora: LoraTraining | None = None
    """Train low-rank adapters. If unset: another member is set."""


class NewRows(StrEnum):
    """Initial value of a row added by a vocabulary resize."""

    MEAN = "mean"
    RANDOM = "random"
    ZERO = "zero"


class Resize(Model):
    """How the embedding and the head grow if the vocabulary is larger than the model's, or larger than the model. New
    tokens take the model's surplus rows first, if it has more rows than its vocabulary has tokens."""

    new_rows: NewRows = NewRows.MEAN
    """Initial value of the new rows. `mean`: mean of the rows of the old vocabulary's sub-tokens of the new piece (as
    in Ziya2, arXiv 2311.03301). `random`: normal with the model's initializer range. `zero`: zeros."""


# -- for how long ------------------------------------------------------------------------------------------------------


class Budget(Model):
    """How long training lasts. Exactly one member must be set."""

    constraints = (exactly_one("tokens", "steps", "epochs"),)

    tokens: Count | None = None
    """Number of training tokens, counted as they enter the model, without padding. If unset: another member is set."""

    steps: Count | None = None
    """Number of optimiser steps. If unset: another member is set."""

    epochs: Annotated[float, Field(ge=0.001, le=10000.0)] | None = None
    """Number of passes over the data. If unset: another member is set."""


class Batch(Model):
    """The global batch of one optimiser step. It does not depend on the number of ranks. Exactly one of `tokens` and
    `samples` must be set."""

    constraints = (exactly_one("tokens", "samples"),)

    tokens: Count | None = None
    """Tokens of one optimiser step over all ranks: `tokens / sequenceLength` rows, rounded down, at least one. If
    unset: `samples` is set."""

    samples: Count | None = None
    """Samples of one optimiser step over all ranks, packed into as few rows as possible. If unset: `tokens` is set."""

    micro_batch_rows: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Rows of `sequenceLength` tokens that a rank computes at once. Gradients of the rest of its share of the batch are
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
    """Shape after the warm-up. `cosine` and `linear` reach the floor at the last step. `constant` stays at the highest
    rate. `wsd` stays there too, then falls linearly to the floor over the last `decayShare` of the steps (arXiv
    2404.06395)."""

    warmup_steps: NonNegativeCount | None = None
    """Number of warm-up steps. If unset: `warmupShare` applies."""

    warmup_share: Fraction = 0.0
    """Share of all steps that are warm-up steps. Ignored if `warmupSteps` is set."""

    floor: Fraction = 0.0
    """Learning rate at the end, as a share of the highest. InstructGPT and InternLM2 use 0.1."""

    decay_share: Fraction = 0.1
    """For `wsd` only: share of all steps over which the rate falls."""


class Optimizer(Model):
    """AdamW (arXiv 1711.05101) with fp32 master weights and moments."""

    learning_rate: Annotated[float, Field(ge=0.0, le=10.0)]
    """Highest learning rate."""

    beta1: Fraction = 0.9
    """Decay of the first moment."""

    beta2: Fraction = 0.95
    """Decay of the second moment. InternLM2 and Ziya2 use 0.95."""

    epsilon: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-8
    """Added to the square root of the second moment."""

    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Decoupled weight decay of matrices. Vectors (norms, biases) are never decayed."""

    clip: Annotated[float, Field(ge=0.0, le=1e6)] | None = 1.0
    """Largest global gradient norm; gradients with a larger norm are scaled down to it. Set to null to disable
    clipping."""


class EarlyStop(Model):
    """Stop training when a held-out loss no longer falls."""

    set: Identifier
    """Name of the held-out set to watch."""

    patience: Annotated[int, Field(ge=1, le=10000)] = 3
    """Consecutive measurements without improvement before training stops."""

    min_delta: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Smallest decrease of the loss, in nats per token, that counts as an improvement."""


# -- with which step ---------------------------------------------------------------------------------------------------


class Precision(StrEnum):
    """Number format of the forward and backward pass. Master weights and moments are always fp32."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Offload(StrEnum):
    """Where DeepSpeed keeps a state between steps."""

    NONE = "none"
    CPU = "cpu"


class Sharding(Model):
    """DeepSpeed ZeRO (arXiv 1910.02054). A single rank without offload uses plain PyTorch instead."""

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
    """ZeRO stage: 0 replicates everything, 1 shards the optimiser state, 2 also the gradients, 3 also the
    parameters."""

    offload_optimizer: Offload = Offload.NONE
    """Where the optimiser state is kept. `cpu` needs `zero` of 1 or more."""

    offload_parameters: Offload = Offload.NONE
    """Where the parameters are kept. `cpu` needs `zero: 3`."""


class Checkpoints(Model):
    """When the whole training state is saved, and which checkpoints are kept until the stage is finished."""

    every_steps: Count | None = None
    """Steps between two checkpoints. If unset: a tenth of the stage."""

    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    """Number of newest checkpoints to keep."""

    keep_every_steps: Count | None = None
    """Also keep checkpoints at multiples of this step. If unset: only the newest are kept."""


class HeldOut(Model):
    """Measurement on held-out text by the training stage itself."""

    sets: Annotated[tuple[NamedSource, ...], Field(max_length=16)] = ()
    """Data sets whose loss, bits per character and perplexity are measured."""

    every_steps: Count | None = None
    """Steps between two measurements. If unset: only before the first step and after the last."""

    max_tokens: Count = 65536
    """Tokens measured per set, starting with the first record."""


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
    """Fields that all kinds of training have in common."""

    data: Annotated[tuple[WeightedSource, ...], Field(min_length=1, max_length=64)]
    """Data sets to train on, mixed exactly by weight."""

    trainable: Trainable = Trainable(full=FullTraining())
    """The parameters that are trained."""

    sequence_length: Annotated[int, Field(ge=8, le=1 << 24)] = 1024
    """Tokens of one row."""

    budget: Budget = Budget(epochs=1.0)
    """How long training lasts."""

    batch: Batch
    """The global batch of one optimiser step."""

    optimizer: Optimizer
    """Settings of AdamW."""

    schedule: Schedule = Schedule()
    """Learning rate over time."""

    precision: Precision = Precision.BF16
    """Number format of the forward and backward pass."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them in memory."""

    sharding: Sharding = Sharding()
    """ZeRO stage and offload."""

    checkpoints: Checkpoints = Checkpoints()
    """When the training state is saved."""

    max_dropped_share: Fraction = 0.05
    """Largest share of samples that may be dropped, truncated or left without any loss, of the training sets together
    and of each held-out set. Above it the stage fails."""

    attention_dropout: Fraction = 0.0
    """Dropout probability of the attention weights during training."""

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
    """Training that measures held-out sets and may stop early because of them."""

    held_out: HeldOut = HeldOut()
    """Measurement before, during and after training."""

    early_stop: EarlyStop | None = None
    """Stop when a held-out loss no longer falls. If unset: only the budget ends training."""


class TextTraining(MeasuredTraining):
    """Fields that `pretrain` and `sft` have in common: they may grow the vocabulary."""

    tokenizer: Reference | None = None
    """Vocabulary: a `tokenizer` artifact or a Hugging Face folder. If unset: the model's own."""

    resize: Resize = Resize()
    """Initial value of new rows if the vocabulary is larger than the model's."""
