"""`rewardModel`: train a model that scores answers, on preferences."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Identifier, Model
from stagecoach_api.constraints import exactly_one
from stagecoach_api.conversation import Template
from stagecoach_api.draft import Draft, Fault, configs, repeated_names
from stagecoach_api.problems import suggest
from stagecoach_api.references import ArtifactType, Format, NamedSource, Reference, WeightedSource
from stagecoach_api.rewards import Domain
from stagecoach_api.rules.formats import only_preferences, training_sets, wrong_formats
from stagecoach_api.stage_kind import Ranks, StageKind, reads
from stagecoach_api.summary_tables import HELD_OUT_TABLES
from stagecoach_api.training import HeldOut, MeasuredTraining


class DomainSource(WeightedSource):
    """Preferences to train on."""

    domain: Identifier | None = None
    """Domain of the preferences: selects the system prompt in `domains` and the row of the report. If unset: no
    domain."""


class DomainNamedSource(NamedSource):
    """Preferences with a name, to measure on."""

    domain: Identifier | None = None
    """Domain of the preferences, as in `data`. If unset: no domain."""


class DomainHeldOut(HeldOut):
    """Measurement on held-out preferences."""

    sets: Annotated[tuple[DomainNamedSource, ...], Field(max_length=16)] = ()
    """Data sets whose loss, accuracy, margin and calibration are measured."""


class PairLoss(Model):
    """Bradley-Terry loss: -log σ(r_w - r_l - margin) for every pair separately."""

    margin: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Margin subtracted before the sigmoid, by which the better answer should lead."""

    centering: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Weight of (r_w + r_l)², which keeps rewards near 0 (arXiv 2312.09244)."""


class RankedLoss(Model):
    """InstructGPT's loss (arXiv 2203.02155): the mean over all pairs of a prompt's answers. All answers of a prompt are
    in one micro-batch, so that a prompt counts once, however many answers it has."""


class FocalLoss(Model):
    """COOL's loss (arXiv 2403.17297): -(1 - 2 max(0, P - ½))^gamma · log P with P = σ(r_w - r_l), plus a barrier that
    keeps rewards within limits."""

    gamma: Annotated[float, Field(ge=0.0, le=10.0)] = 2.0
    """Exponent: how fast easy pairs lose weight."""

    barrier: Annotated[float, Field(ge=0.0, le=100.0)] = 0.02
    """Weight of the barrier -(log(x + limit) + log(limit - x))."""

    limit: Annotated[float, Field(ge=0.01, le=1000.0)] = 5.0
    """Rewards stay within (-limit, limit)."""


class PreferenceLoss(Model):
    """Loss of a reward model. Exactly one member must be set."""

    constraints = (exactly_one("pair", "ranked", "focal"),)

    pair: PairLoss | None = None
    """Bradley-Terry loss. If unset: another member is set."""

    ranked: RankedLoss | None = None
    """InstructGPT's ranking loss over all pairs of a prompt. If unset: another member is set."""

    focal: FocalLoss | None = None
    """COOL's focal ranking loss with a barrier. If unset: another member is set."""


class BiasOn(StrEnum):
    """Answers whose mean reward the bias sets to 0."""

    NONE = "none"
    CHOSEN = "chosen"
    ALL = "all"


class RewardModelStage(MeasuredTraining):
    """Train a model that scores answers. `budget` and `batch` count prompts with all their answers."""

    model: Reference
    """Model to start from, usually an `sft` stage's. Its head is replaced with a linear one on the last token."""

    data: Annotated[tuple[DomainSource, ...], Field(min_length=1, max_length=64)]
    """Preferences to train on, mixed exactly by weight: pairs, comparisons or ranked answers."""

    held_out: DomainHeldOut = DomainHeldOut()
    """Measurement before, during and after training."""

    template: Template | None = None
    """How conversations are rendered as text. If unset: the chat template of the model's tokenizer."""

    loss: PreferenceLoss = PreferenceLoss(ranked=RankedLoss())
    """Loss to minimise."""

    domains: Annotated[tuple[Domain, ...], Field(max_length=64)] = ()
    """System prompts by domain."""

    normalize_bias: BiasOn = BiasOn.CHOSEN
    """Answers of the training set whose mean reward is set to 0 by the head's bias after training, as InstructGPT does
    before PPO."""


# -- rules -------------------------------------------------------------------------------------------------------------


def reward_models_learn_from_preferences(draft: Draft) -> Iterator[Fault]:
    yield from only_preferences(draft, RewardModelStage)


def reward_models_do_not_learn_from_labels(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, RewardModelStage):
        yield from wrong_formats(
            stage,
            training_sets(config),
            {Format.LABELS},
            "a reward model compares answers to one prompt, and labels judge one answer each",
            "give pairs, comparison or ranked, or train on the labels in a `dpo` stage with `loss: {kto: {}}`",
        )


def domain_names_are_unique(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, RewardModelStage):
        yield from repeated_names(stage.at("domains"), [domain.name for domain in config.domains])


def domains_of_sets_exist(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, RewardModelStage):
        names = [domain.name for domain in config.domains]
        for path, source in training_sets(config):
            domain = getattr(source, "domain", None)
            if names and domain is not None and domain not in names:
                rule = "must be the name of one of `domains`"
                yield Fault(stage.at(*path, "domain"), domain, rule, suggest(domain, names))


KIND = StageKind(
    name="rewardModel",
    position=50,
    summary="Train a model that scores answers, on preferences.",
    config=RewardModelStage,
    makes=ArtifactType.REWARD_MODEL,
    reads={"model": reads(ArtifactType.MODEL)},
    ranks=Ranks.ALL,
    heavy=True,
    tables=HELD_OUT_TABLES,
    rules=(
        reward_models_learn_from_preferences,
        reward_models_do_not_learn_from_labels,
        domain_names_are_unique,
        domains_of_sets_exist,
    ),
)
