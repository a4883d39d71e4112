"""The `rewardModel` stage: train a model on preferences to score answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stagecoach_api.artifacts import RewardCard
from stagecoach_api.kinds.reward_model import BiasOn, DomainNamedSource, DomainSource, RewardModelStage
from stagecoach_trainer.align.reward_held_out import PreferenceSet, TrainingSample, join_rewards, length_baseline
from stagecoach_trainer.align.reward_objective import RewardObjective, counting_of
from stagecoach_trainer.loop.job import TrainingJob, TrainingResult
from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.models.save_check import TrainingLength, check_saving
from stagecoach_trainer.models.shipping import rehearse, save_result
from stagecoach_trainer.models.trainable import choose_trainable, count_parameters
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import Diverged, UserError
from stagecoach_trainer.samples.groups import (
    LOST_ANSWERS,
    Group,
    GroupShard,
    check_left_out,
    check_lost_answers,
    measured_groups,
    plan_groups,
)
from stagecoach_trainer.samples.plan import MixedPlan
from stagecoach_trainer.samples.preferences import Grouping, group_shard
from stagecoach_trainer.stage_parts.reports import table, training_text, write_report
from stagecoach_trainer.stage_parts.training import Prepared, check_before_loading, make_report, start_with_template

BIAS_ANSWERS = 1024
"""Maximum number of training answers from which the bias is computed."""

NO_DOMAIN = "none"
"""The report's name for preferences without a domain."""

FIGURES = ("pairs", "accuracy", "lengthBaseline", "margin", "calibrationError", "loss")


def run(config: RewardModelStage, context: StageContext) -> StageOutcome:
    """Train a reward model; write a sequence classifier with one label or a PEFT adapter, with tokenizer.

    Raises:
        UserError: Data, model or settings are invalid or do not match each other.
        Interrupted: A stop was requested.
        Diverged: As `train`, or the mean reward is NaN or infinite.
    """
    from stagecoach_trainer.loop.loop import train

    _check(config)
    language_model, warnings = start_with_template(context, config.model, config.template, config.sequence_length)
    start = replace(language_model, model=make_reward_model(language_model.model, context.seed))
    rehearse(context, start, config.trainable.lora is not None)
    shards = {source.label: _shard(config, context, source, start.tokenizer) for source in config.data}
    check_lost_answers({name: shard.counts for name, shard in shards.items()}, config.max_dropped_share)
    plan = plan_groups(shards, config, counting_of(config.loss), context.seed)
    held_out = tuple(_held_out(config, context, source, start.tokenizer) for source in config.held_out.sets)
    trained = choose_trainable(start.model, config.trainable, start.new_rows, context.seed)
    parameters = count_parameters(trained.model)
    check_saving(context, start, trained, TrainingLength(config.checkpoints, plan.num_steps, parameters["trained"]))
    job = TrainingJob(
        trained.model,
        config,
        plan,
        held_out,
        objective=RewardObjective(config.loss),
        at_end=_sample(config.normalize_bias, plan),
    )
    result = train(job, context)
    bias = _bias(result)
    metrics = dict(result.metrics) | {
        f"heldOut.{item.name}.lengthBaseline": length_baseline(item.groups) for item in held_out
    }
    if context.world.is_main:
        context.progress.report("save")
        save_result(context, start, trained, _card(config, bias))
        prepared = Prepared(start, {name: item.shard for name, item in shards.items()}, plan, (), tuple(warnings))
        report = make_report(prepared, result, trained.notes, parameters, metrics)
        report |= {"bias": bias, "heldOut": _tables(config, held_out)}
        write_report(context, report, report_text(report))
    return StageOutcome(tokens=result.tokens, metrics=metrics)


# -- before training ---------------------------------------------------------------------------------------------------


def _check(config: RewardModelStage) -> None:
    check_before_loading(config, from_nothing=False)
    names = [domain.name for domain in config.domains]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"domains: two domains are named {twice[0]!r}; give each a unique name")
    for where, sources in (("data", config.data), ("heldOut.sets", config.held_out.sets)):
        for source in sources:
            if names and source.domain is not None and source.domain not in names:
                raise UserError(
                    f"{where}: the domain {source.domain!r} of {source.label} is not in `domains`, which has "
                    f"{', '.join(names)}; add a system prompt for it, or remove the set's `domain`"
                )
    if config.trainable.embeddings is not None:
        raise UserError("trainable.embeddings: a reward model's head is new and must learn; train `full` or `lora`")
    if config.trainable.lora is not None and config.trainable.lora.continue_adapter:
        raise UserError(
            "trainable.lora.continueAdapter: a reward model has a new head, so its adapter is a new one over the "
            "merged `model`; remove the field"
        )


def _system(config: RewardModelStage, domain: str | None) -> str | None:
    return next((item.system for item in config.domains if item.name == domain), None)


def _shard(
    config: RewardModelStage, context: StageContext, source: DomainSource | DomainNamedSource, tokenizer: Any
) -> GroupShard:
    system = _system(config, source.domain)
    return group_shard(context, source, tokenizer, config.sequence_length, Grouping.PROMPTS, system)


def _held_out(
    config: RewardModelStage, context: StageContext, source: DomainNamedSource, tokenizer: Any
) -> PreferenceSet:
    """Return a held-out set: its first prompts, up to `maxTokens` tokens."""
    shard = _shard(config, context, source, tokenizer)
    check_left_out(source.name, shard.counts, config.max_dropped_share, context.progress.warn)
    groups = measured_groups(shard, counting_of(config.loss), config.held_out.max_tokens, source.name)
    return PreferenceSet(source.name, groups, config.loss, source.domain)


# -- bias --------------------------------------------------------------------------------------------------------------


def _sample(normalize: BiasOn, plan: MixedPlan) -> tuple[TrainingSample, ...]:
    """Return the answers from which the bias is computed: the first ones of training, in its mix."""
    if normalize is BiasOn.NONE:
        return ()
    groups: list[Group] = []
    answers = 0
    for step in range(plan.num_steps):
        for group in plan.rows(step):
            if groups and answers + len(group.sequences) > BIAS_ANSWERS:
                return (TrainingSample(groups, normalize is BiasOn.CHOSEN),)
            groups.append(group)
            answers += len(group.sequences)
    return (TrainingSample(groups, normalize is BiasOn.CHOSEN),)


def _bias(result: TrainingResult) -> float:
    """Return the bias: the negative mean reward. Raises Diverged if it is NaN or infinite."""
    mean = result.metrics.get(f"{TrainingSample.name}.meanReward", 0.0)
    if not math.isfinite(mean):
        raise Diverged(f"the mean reward of the training set is {mean}; lower `optimizer.learningRate`")
    return 0.0 - mean  # not -mean: the bias of a mean of 0 is 0, not -0


def _card(config: RewardModelStage, bias: float) -> RewardCard:
    return RewardCard(bias=bias, domains={domain.name: domain.system for domain in config.domains})


# -- report ------------------------------------------------------------------------------------------------------------


def _tables(config: RewardModelStage, held_out: Sequence[PreferenceSet]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures after training by set and by domain."""
    by_domain: dict[str, list[PreferenceSet]] = {}
    for item in held_out:
        by_domain.setdefault(item.domain or NO_DOMAIN, []).append(item)
    return {
        "sets": {item.name: _figures(config, [item]) for item in held_out},
        "domains": {name: _figures(config, items) for name, items in sorted(by_domain.items())},
    }


def _figures(config: RewardModelStage, items: Sequence[PreferenceSet]) -> dict[str, float]:
    measured = join_rewards([item.latest for item in items if item.latest is not None])
    groups = [group for item in items for group in item.groups]
    found = measured.figures(config.loss) | {"lengthBaseline": length_baseline(groups), "pairs": len(measured.better)}
    return {name: found[name] for name in FIGURES}


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report for people, in Markdown."""
    more = ["", f"The bias of every reward is {report['bias']:.4f}."]
    for what, found in (("held-out set", "sets"), ("domain", "domains")):
        if report["heldOut"][found]:
            more += ["", *table(what, FIGURES, report["heldOut"][found])]
    if report["heldOut"]["sets"]:
        more += ["", "`lengthBaseline` is the accuracy of preferring the longer answer."]
    columns = ("records", "groups", "answers", "pairs", "ties", *LOST_ANSWERS)
    return training_text("rewardModel", report, columns, more)
