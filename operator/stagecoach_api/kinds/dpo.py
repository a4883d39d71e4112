"""`dpo`: learn from preferences directly, without a reward model (DPO, IPO, KTO)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from stagecoach_api.base import Model
from stagecoach_api.conversation import Template
from stagecoach_api.references import Reference
from stagecoach_api.training import MeasuredTraining, require_exactly_one

Beta = Annotated[float, Field(ge=1e-6, le=1000.0)]


class SigmoidLoss(Model):
    """DPO (arXiv 2305.18290): -log σ(beta · (log-ratio of the better answer - that of the other))."""

    beta: Beta = 0.1
    """How strongly the policy is held to the reference. Default: 0.1."""

    label_smoothing: Annotated[float, Field(ge=0.0, le=0.49)] = 0.0
    """Share of preferences taken to be the wrong way round (conservative DPO). Default: 0."""


class IpoLoss(Model):
    """IPO (arXiv 2310.12036): (difference of the mean log-ratios per token - 1 / (2 beta))²."""

    beta: Beta = 0.1
    """How strongly the policy is held to the reference. Default: 0.1."""


class KtoLoss(Model):
    """KTO (arXiv 2402.01306): single answers, good or bad; pairs count as one of each."""

    beta: Beta = 0.1
    """How strongly the policy is held to the reference. Default: 0.1."""

    desirable_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0
    """Weight of good answers. Default: 1."""

    undesirable_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0
    """Weight of bad answers. Default: 1."""


class DirectLoss(Model):
    """What is minimised. Exactly one member."""

    sigmoid: SigmoidLoss | None = None
    """DPO. None: another member is given."""

    ipo: IpoLoss | None = None
    """IPO. None: another member is given."""

    kto: KtoLoss | None = None
    """KTO. None: another member is given."""

    @model_validator(mode="after")
    def _one(self) -> DirectLoss:
        require_exactly_one(self, "sigmoid", "ipo", "kto")
        return self


class DpoStage(MeasuredTraining):
    """Train a policy on preferences. `budget` and `batch` count pairs; for KTO, answers."""

    model: Reference
    """The policy to start from, usually an `sft` stage's."""

    reference: Reference | None = None
    """The model the policy is held to; its log-probabilities are computed once, before training. None: `model`."""

    template: Template | None = None
    """How a conversation becomes text. None: the chat template of the model's tokenizer."""

    loss: DirectLoss = DirectLoss(sigmoid=SigmoidLoss())
    """What is minimised. Default: sigmoid."""
