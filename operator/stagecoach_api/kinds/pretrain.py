"""`pretrain`: next-token training on text, from scratch or onwards from a model."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from stagecoach_api.base import Count, Identifier, Model, Weight
from stagecoach_api.references import Reference
from stagecoach_api.training import TextTraining, require_exactly_one


class Architecture(Model):
    """A LLaMA decoder made from nothing (transformers' `LlamaConfig`). The vocabulary's size is the tokenizer's."""

    hidden_size: Annotated[int, Field(ge=8, le=65536)]
    """Width D of the residual stream."""

    intermediate_size: Annotated[int, Field(ge=8, le=1 << 20)]
    """Width of the SwiGLU feed-forward layer."""

    num_layers: Annotated[int, Field(ge=1, le=1024)]
    """Decoder blocks."""

    num_heads: Annotated[int, Field(ge=1, le=1024)]
    """Attention heads; must divide `hiddenSize`."""

    num_key_value_heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Key and value heads (grouped-query attention); must divide `numHeads`. None: as many as `numHeads`."""

    max_position_embeddings: Annotated[int, Field(ge=8, le=1 << 24)] = 2048
    """Longest context the model states. Default: 2,048."""

    rope_theta: Annotated[float, Field(ge=1.0, le=1e12)] = 10000.0
    """Base of the rotary position embedding. Default: 10,000."""

    norm_epsilon: Annotated[float, Field(ge=1e-12, le=1e-2)] = 1e-5
    """Epsilon of RMSNorm. Default: 1e-5."""

    initializer_range: Annotated[float, Field(ge=0.0, le=1.0)] = 0.02
    """Standard deviation of new weights. Default: 0.02."""

    tie_embeddings: bool = False
    """Let the head share the input embedding's matrix. Default: false."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"`hiddenSize` ({self.hidden_size}) must be divisible by `numHeads` ({self.num_heads})")
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            raise ValueError(
                f"`numHeads` ({self.num_heads}) must be divisible by `numKeyValueHeads` ({self.num_key_value_heads})"
            )
        return self


class RopeScalingName(StrEnum):
    """Ways to stretch rotary positions beyond the trained context."""

    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"


class RopeScaling(Model):
    """Stretch rotary positions (InternLM2 reads 200K after training at 32K)."""

    name: RopeScalingName
    """`linear`, `dynamic` or `yarn`, as transformers names them."""

    factor: Annotated[float, Field(ge=1.0, le=1e4)]
    """By how much the context grows."""


class DataWeight(Model):
    """Share of one data set in a phase."""

    name: Identifier
    """The set's name in `data`."""

    weight: Weight
    """Its share of the phase's tokens, relative to the other weights. 0 leaves it out."""


class Phase(Model):
    """A part of training with settings of its own. Every None takes the stage's own value."""

    name: Identifier
    """What progress and reports call it."""

    tokens: Count
    """Training tokens of this phase."""

    sequence_length: Annotated[int, Field(ge=8, le=1 << 24)] | None = None
    """Tokens of one row. None: the stage's."""

    batch_tokens: Count | None = None
    """Tokens of one optimiser step over all ranks. None: the stage's `batch`."""

    learning_rate: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    """Highest learning rate; the phase then has the stage's schedule to itself. None: the stage's one schedule goes on
    across phases."""

    weights: Annotated[tuple[DataWeight, ...], Field(max_length=64)] = ()
    """The phase's data mix. Default: the weights given in `data`."""

    rope_theta: Annotated[float, Field(ge=1.0, le=1e12)] | None = None
    """Base of the rotary position embedding from this phase on (InternLM2: 50,000, then 1,000,000). None: as before."""


class PretrainStage(TextTraining):
    """Next-token training on text."""

    model: Reference | None = None
    """Model to go on from: a stage's artifact or a Hugging Face folder (safetensors only). None: `architecture`."""

    architecture: Architecture | None = None
    """Start from nothing with this shape. None: `model` is given."""

    rope_theta: Annotated[float, Field(ge=1.0, le=1e12)] | None = None
    """New base of the rotary position embedding. None: the model's own."""

    rope_scaling: RopeScaling | None = None
    """Stretch rotary positions. None: the model's own."""

    phases: Annotated[tuple[Phase, ...], Field(max_length=32)] = ()
    """Parts of training, in order; their tokens are the budget. Default: one phase with the stage's own settings and
    `budget`."""

    @model_validator(mode="after")
    def _has_a_start(self) -> PretrainStage:
        require_exactly_one(self, "model", "architecture")
        if self.architecture is not None and self.tokenizer is None:
            raise ValueError("`architecture` needs a `tokenizer`")
        return self
