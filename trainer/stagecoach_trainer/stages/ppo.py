"""The `ppo` stage: train a policy to maximise a reward, with a critic and a penalty on the KL to a reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from stagecoach_api.conversation import Loss, TooLong
from stagecoach_api.kinds.ppo import PpoStage, PretrainingMix
from stagecoach_api.training import Batch, Budget
from stagecoach_trainer.batches.mixing import Mix, Stream, make_key
from stagecoach_trainer.data.notes import warn_of_notes
from stagecoach_trainer.kernels.dropout import switch_off_dropout
from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.models.save_check import TrainingLength, check_saving
from stagecoach_trainer.models.shipping import rehearse, save_result
from stagecoach_trainer.models.starting_point import StartingPoint
from stagecoach_trainer.models.trainable import choose_trainable, count_parameters
from stagecoach_trainer.models.vocabularies import require_vocabulary_of_reference
from stagecoach_trainer.ppo.critics import make_critic
from stagecoach_trainer.ppo.job import PpoJob, PpoResult
from stagecoach_trainer.ppo.prompt_plan import PromptPlan
from stagecoach_trainer.ppo.shared_weights import share_frozen
from stagecoach_trainer.rewards.total import RewardSum
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.datasets import (
    LOST_SAMPLES,
    check_lost_samples,
    conversation_shard,
    is_conversation,
    text_shard,
)
from stagecoach_trainer.samples.plan import WHOLE, MixedPlan, PhaseSettings, Planner
from stagecoach_trainer.samples.prompts import PromptSet, read_prompts
from stagecoach_trainer.samples.token_cache import TokenShard
from stagecoach_trainer.stage_parts.reports import table, trained_parameters, write_report
from stagecoach_trainer.stage_parts.training import start_with_template

KEY_PROMPTS, KEY_MIX = 11, 12
DROPPED = ("tooLong", "empty")
SHOWN = ("reward", "kl", "entropy", "endedShare", "answerTokens")


def run(config: PpoStage, context: StageContext) -> StageOutcome:
    """Train a policy by PPO; write a model folder or a PEFT adapter, with the tokenizer and its chat template.

    Raises:
        UserError: Data, models or settings are invalid or do not match each other.
        Interrupted: A stop was requested.
        Diverged: A guard is violated, or a gradient is NaN or infinite.
    """
    from stagecoach_trainer.ppo.loop import train_policy

    start, warnings = _start(config, context)
    prompts = _prompts(config, context, start.tokenizer)
    texts = _texts(config, context, start.tokenizer)
    # Only frozen weights can be shared. Sharing after each load keeps the peak memory below two copies of the base.
    start.model.requires_grad_(config.trainable.lora is None)
    rewards = _rewards(config, context)
    rewards.require_domains({f"data[{index}].domain": source.domain for index, source in enumerate(config.data)})
    reward_models = [term.model for term in rewards.reward_models().values()]
    share_frozen([start.model, *reward_models])
    rehearse(context, start, config.trainable.lora is not None)
    critic = make_critic(config, context, start)
    share_frozen([start.model, *reward_models, critic.model])
    reference = _reference(config, context, start)
    policy = choose_trainable(start.model, config.trainable, start.new_rows, context.seed)
    warnings += [*start.warnings, *_without_dropout(policy.model, critic.model)]
    parameters = count_parameters(policy.model)
    plan = _prompt_plan(config, context, prompts)
    both = parameters["trained"] + count_parameters(critic.model)["trained"]
    check_saving(context, start, policy, TrainingLength(config.checkpoints, plan.num_updates, both))
    job = PpoJob(
        config=config,
        policy=policy.model,
        critic=critic.model,
        critic_bias=critic.bias,
        reference=reference,
        tokenizer=start.tokenizer,
        rewards=rewards,
        prompts=plan,
        text=_text(config, context, texts, plan),
        inference_only=reward_models,
    )
    result = train_policy(job, context)
    figures = rewards.figures()
    if context.world.is_main:
        context.progress.report("save")
        save_result(context, start, policy)
        details = {
            "data": {name: dict(found.counts) for name, found in prompts.items()},
            "parameters": dict(parameters),
            "pretraining": {name: dict(shard.counts) for name, shard in texts.items()},
            "rewards": figures,
            "samplesPerUpdate": plan.samples_per_update,
            "trained": [*policy.notes],
            "warnings": warnings,
        }
        _report(context, result, details)
    return StageOutcome(tokens=result.tokens, metrics=result.metrics)


# -- models ------------------------------------------------------------------------------------------------------------


def _start(config: PpoStage, context: StageContext) -> tuple[StartingPoint, list[str]]:
    lora = config.trainable.lora
    if lora is not None and lora.continue_adapter:
        raise UserError(
            "trainable.lora.continueAdapter: PPO starts a new adapter over the merged `model`, whose weights are the "
            "reference; leave it out"
        )
    return start_with_template(context, config.model, config.template, config.sequence_length)


def _rewards(config: PpoStage, context: StageContext) -> RewardSum:
    import torch

    from stagecoach_trainer.engine.sharded import shards_frozen_models
    from stagecoach_trainer.loop.loop import training_device

    rows = config.rollout.batch_rows
    whole = not shards_frozen_models(config, context.world)  # sharded models are moved to the device one by one
    device = training_device(context.world) if whole else torch.device("cpu")
    merge = config.trainable.lora is None  # unmerged, models over the same base can share it
    return RewardSum.build(config.rewards, context, device, config.precision, rows, merge=merge)


def _without_dropout(policy: Any, critic: Any) -> list[str]:
    """Switch dropout off, so that training computes the same log-probabilities as the rollout. Return a warning for
    each model that this changes."""
    warnings = []
    for whose, model in (("policy", policy), ("critic", critic)):
        found = ", ".join(f"{name} {value:g}" for name, value in sorted(switch_off_dropout(model).items()))
        if found:
            warnings.append(
                f"the {whose}'s dropout is switched off ({found}): PPO compares what a model says while it learns with "
                "what it said before"
            )
    return warnings


def _reference(config: PpoStage, context: StageContext, start: StartingPoint) -> Any | None:
    """Return the frozen reference model; None if the base under the policy's new adapter serves as the reference."""
    lora = config.trainable.lora
    if config.reference is not None:
        loaded = load_model(context, config.reference)
        require_vocabulary_of_reference(start.tokenizer, loaded.require_tokenizer())
        return loaded.model
    if lora is not None and not lora.modules_to_save and not lora.new_rows:
        return None
    return copy.deepcopy(start.model)


# -- prompts and text --------------------------------------------------------------------------------------------------


def _prompts(config: PpoStage, context: StageContext, tokenizer: Any) -> dict[str, PromptSet]:
    """Return the prompts of each set. Raises UserError if all of a set, or too many, are dropped."""
    longest = config.sequence_length - config.rollout.max_new_tokens
    if longest < 1:
        raise UserError(
            f"rollout.maxNewTokens: {config.rollout.max_new_tokens} leaves no tokens for a prompt in `sequenceLength` "
            f"{config.sequence_length}; lower it, or raise `sequenceLength`"
        )
    found = {source.label: read_prompts(context, source, tokenizer, longest, source.domain) for source in config.data}
    for label, prompts in found.items():
        warn_of_notes(context.progress.warn, prompts.counts, label)
        lost = sum(prompts.counts[name] for name in DROPPED)
        why = ", ".join(f"{name} {prompts.counts[name]}" for name in DROPPED)
        if not prompts.prompts:
            raise UserError(f"data: {label} has no usable prompts ({why}); a prompt may have up to {longest} tokens")
        share = lost / prompts.counts["records"]
        if share > config.max_dropped_share:
            raise UserError(
                f"data: {share:.1%} of {label}'s prompts were left out ({why}), more than `maxDroppedShare` "
                f"{config.max_dropped_share:.1%}; raise `sequenceLength`, or allow more"
            )
    return found


def _prompt_plan(config: PpoStage, context: StageContext, found: Mapping[str, PromptSet]) -> PromptPlan:
    sets = tuple(item.prompts for item in found.values())
    samples = config.batch.samples or 1
    size = sum(len(prompts) for prompts in sets)
    updates = config.budget.steps or max(1, round((config.budget.epochs or 1.0) * size / samples))
    weights = [source.weight for source in config.data]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise UserError("data: give a `weight` to every set or to none")
    shares = [float(len(prompts)) if weight is None else weight for prompts, weight in zip(sets, weights, strict=True)]
    streams = [Stream(len(item), make_key(context.seed, KEY_PROMPTS, number)) for number, item in enumerate(sets)]
    mix = Mix(streams, shares, updates * samples, make_key(context.seed, KEY_MIX), [0] * len(sets))
    return PromptPlan(sets, mix, samples, updates)


def _texts(config: PpoStage, context: StageContext, tokenizer: Any) -> dict[str, TokenShard]:
    """Return the sets of text for `pretraining`. Raises UserError if too much of it is dropped."""
    mix = config.pretraining
    if mix is None:
        return {}
    shards = {source.label: _shard(config, context, mix, number, tokenizer) for number, source in enumerate(mix.data)}
    counts = {name: shard.counts for name, shard in shards.items()}
    check_lost_samples(counts, config.max_dropped_share, "pretraining.data", "raise `sequenceLength`, or allow more")
    return shards


def _text(
    config: PpoStage, context: StageContext, shards: Mapping[str, TokenShard], plan: PromptPlan
) -> MixedPlan | None:
    """Return the plan of the text: one step of text for each optimiser step of the policy."""
    mix = config.pretraining
    if mix is None:
        return None
    mini_batches = plan.samples_per_update // (config.policy.mini_batch_samples or plan.samples_per_update)
    steps = plan.num_updates * config.policy.inner_epochs * mini_batches
    weights = [source.weight for source in mix.data]
    settings = PhaseSettings(
        name=WHOLE,
        sequence_length=config.sequence_length,
        batch=Batch(tokens=mix.rows_per_step * config.sequence_length),
        budget=Budget(steps=steps),
        weights=None if None in weights else tuple(weight or 0.0 for weight in weights),
    )
    return Planner(shards, context.seed).plan([settings])


def _shard(config: PpoStage, context: StageContext, mix: PretrainingMix, number: int, tokenizer: Any) -> TokenShard:
    source = mix.data[number]
    if is_conversation(context, source):
        return conversation_shard(context, source, tokenizer, Loss(), TooLong.DROP, config.sequence_length)
    return text_shard(context, source, tokenizer)


# -- report ------------------------------------------------------------------------------------------------------------


def _report(context: StageContext, result: PpoResult, details: Mapping[str, Any]) -> None:
    """Write the report: the result of training, and `details` of its inputs."""
    report = {
        **details,
        "history": [dict(point) for point in result.history],
        "metrics": dict(sorted(result.metrics.items())),
        "tokens": result.tokens,
        "updates": result.updates,
    }
    write_report(context, report, _report_text(report))


def _report_text(report: Mapping[str, Any]) -> str:
    """Return the report for people, in Markdown."""
    points = [point for point in report["history"] if "reward" in point]
    lines = [
        "# ppo",
        "",
        f"{report['updates']:,} updates of {report['samplesPerUpdate']:,} answers; {trained_parameters(report)}.",
        "",
        *table("prompts", ("records", "prompts", *DROPPED), report["data"]),
        *_text_lines(report["pretraining"]),
        "",
        *table("update", SHOWN, {str(point["step"]): point for point in points[:: max(1, len(points) // 10)]}),
        "",
        *(f"Warning: {warning}" for warning in report["warnings"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _text_lines(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    return ["", *table("text beside", ("records", "samples", "tokens", *LOST_SAMPLES), counts)] if counts else []
