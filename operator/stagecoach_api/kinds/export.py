"""`export`: make a release of a model, and prove it before it counts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stagecoach_api.base import LongText, Model
from stagecoach_api.generation import Generation, Samples
from stagecoach_api.references import Artifact, Reference
from stagecoach_api.stage_kind import StageConfig, StageKind, reads
from stagecoach_api.training import Precision


class Proof(Model):
    """What the reloaded release must show."""

    max_kl: Annotated[float, Field(ge=0.0, le=10.0)] = 1e-3
    """Largest mean KL divergence, in nats per token, between the model before and the release after reload, both in
    fp32. Default: 1e-3."""

    tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    """Tokens on which it is measured. Default: 512."""


class ExportStage(StageConfig):
    """A release in Hugging Face layout: safetensors, tokenizer with chat template, generation settings."""

    model: Reference
    """Model or adapter to release."""

    merge_adapters: bool = True
    """Merge adapters into the weights. False releases the adapter as it is. Default: true."""

    precision: Precision = Precision.BF16
    """Number format of the released weights. Default: bf16."""

    max_shard_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 40)] = 5 * 10**9
    """Largest weight file. Default: 5 GB."""

    chat_template: LongText | None = None
    """A Jinja chat template to ship. If unset: the tokenizer's own."""

    generation: Generation = Generation()
    """Settings written to `generation_config.json`. Default: greedy, 64 new tokens."""

    samples: Samples | None = None
    """Prompts that the reloaded release answers in the report. If unset: none."""

    proof: Proof = Proof()
    """What the reloaded release must show before it counts. Default: every field's own."""


KIND = StageKind(
    name="export",
    position=90,
    summary="Make a release of a model.",
    config=ExportStage,
    makes=Artifact.MODEL,
    reads={"model": reads(Artifact.MODEL)},
    heavy=True,
    release=True,
    tables=(),
)
