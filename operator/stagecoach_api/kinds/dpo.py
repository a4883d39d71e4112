"""`dpo`: learn from preferences directly, without a reward model (DPO, IPO, KTO)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Model
from stagecoach_api.constraints import exactly_one
from stagecoach_api.conversation import Template
from stagecoach_api.draft import Draft, Fault, configs
from stagecoach_api.references import ArtifactType, Format, Reference
from stagecoach_api.rules.formats import only_preferences, training_sets, wrong_formats
from stagecoach_api.stage_kind import Ranks, StageKind, reads
from stagecoach_api.summary_tables import HELD_OUT_TABLES
from stagecoach_api.training import MeasuredTraining

Beta = Annotated[float, Field(ge=1e-6, le=1000.0)]


class SigmoidLoss(Model):
    """DPO (arXiv 2305.18290): -log σ(beta · (log-ratio of the better answer - log-ratio of the other))."""

    beta: Beta = 0.1
    """Strength of the constraint to the reference."""

    label_smoothing: Annotated[float, Field(ge=0.0, le=0.49)] = 0.0
    """Share of preferences assumed to be the wrong way round (conservative DPO)."""


class IpoLoss(Model):
    """IPO (arXiv 2310.12036): (difference of the mean log-ratios per token - 1 / (2 beta))²."""

    beta: Beta = 0.1
    """Strength of the constraint to the reference."""


class KtoLoss(Model):
    """KTO (arXiv 2402.01306): single answers, good or bad. A pair counts as one of each."""

    beta: Beta = 0.1
    """Strength of the constraint to the reference."""

    desirable_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0
    """Weight of good answers."""

    undesirable_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0
    """Weight of bad answers."""


class DirectLoss(Model):
    """Loss of direct preference optimisation. Exactly one member must be set."""

    constraints = (exactly_one("sigmoid", "ipo", "kto"),)

    sigmoid: SigmoidLoss | None = None
    """DPO. If unset: another member is set."""

    ipo: IpoLoss | None = None
    """IPO. If unset: another member is set."""

    kto: KtoLoss | None = None
    """KTO. If unset: another member is set."""


class DpoStage(MeasuredTraining):
    """Train a policy on preferences directly. `budget` and `batch` count pairs, or answers for KTO."""

    model: Reference
    """Policy to start from, usually an `sft` stage's."""

    reference: Reference | None = None
    """Reference model of the policy. Its log-probabilities are computed once, before training. If unset: `model`."""

    template: Template | None = None
    """How conversations are rendered as text. If unset: the chat template of the model's tokenizer."""

    loss: DirectLoss = DirectLoss(sigmoid=SigmoidLoss())
    """Loss to minimise."""


# -- rules -------------------------------------------------------------------------------------------------------------


def dpo_learns_from_preferences(draft: Draft) -> Iterator[Fault]:
    yield from only_preferences(draft, DpoStage)


def labels_need_kto(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, DpoStage):
        yield from wrong_formats(
            stage,
            training_sets(config) if config.loss.kto is None else (),
            {Format.LABELS},
            "this loss compares two answers to one prompt, and labels judge one answer each",
            "set `loss: {kto: {}}`, or give pairs, comparison or ranked",
        )


KIND = StageKind(
    name="dpo",
    position=70,
    summary="Train a policy on preferences directly, without a reward model.",
    config=DpoStage,
    makes=ArtifactType.MODEL,
    reads={"model": reads(ArtifactType.MODEL), "reference": reads(ArtifactType.MODEL)},
    ranks=Ranks.ALL,
    heavy=True,
    tables=HELD_OUT_TABLES,
    rules=(dpo_learns_from_preferences, labels_need_kto),
)
