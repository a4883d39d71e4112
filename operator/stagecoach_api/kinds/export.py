"""`export`: make a release of a model, and check it before it is published."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stagecoach_api.base import LongText, Model, ShortText
from stagecoach_api.constraints import Constraint, equals, given, implies
from stagecoach_api.generation import ReleasedGeneration, Samples
from stagecoach_api.references import ArtifactType, Reference
from stagecoach_api.stage_kind import StageConfig, StageKind, reads
from stagecoach_api.training import Precision


class Proof(Model):
    """Requirements that the reloaded release must meet."""

    max_kl: Annotated[float, Field(ge=0.0, le=10.0)] = 1e-3
    """Largest mean KL divergence, in nats per token, between the original model and the reloaded release, both in
    fp32."""

    tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    """Number of tokens on which it is measured."""


class ExportStage(StageConfig):
    """Make a release in Hugging Face layout: safetensors, tokenizer with chat template, generation settings."""

    constraints = (
        Constraint(
            implies(given("base_model"), equals("merge_adapters", False)),
            "`baseModel` names the base of a released adapter; a merged release has no base",
            "remove it, or set `mergeAdapters: false`",
        ),
        Constraint(
            implies(given("generation"), equals("merge_adapters", True)),
            "an adapter has no generation settings; those of its base are used",
            "remove `generation`, or `mergeAdapters: false`",
        ),
    )

    model: Reference
    """Model or adapter to release."""

    merge_adapters: bool = True
    """Merge adapters into the weights. False releases an adapter that plain PEFT opens: adapters over adapters become
    one if all are plain LoRA, otherwise the lower ones are merged into the base."""

    base_model: ShortText | None = None
    """Name or path by which others find the base of an adapter, such as `Qwen/Qwen2.5-7B`; written as it is given.
    If unset: the base is released with the adapter, in its folder `base`."""

    precision: Precision = Precision.BF16
    """Number format of the released weights."""

    max_shard_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 40)] = 5 * 10**9
    """Size of the largest weight file, in bytes."""

    chat_template: LongText | None = None
    """Jinja chat template of the release. If unset: the tokenizer's own."""

    generation: ReleasedGeneration | None = None
    """Settings of `generation_config.json` that replace the base's own. If unset: those are kept."""

    samples: Samples | None = None
    """Prompts that the reloaded release answers in the report. If unset: none."""

    proof: Proof = Proof()
    """Requirements that the reloaded release must meet before it is published."""


KIND = StageKind(
    name="export",
    position=90,
    summary="Make a release of a model.",
    config=ExportStage,
    makes=ArtifactType.MODEL,
    reads={"model": reads(ArtifactType.MODEL)},
    heavy=True,
    release=True,
    tables=(),
)
