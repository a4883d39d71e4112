"""`sft`: supervised fine-tuning on instructions and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagecoach_api.kinds.sft import HindsightMode, SftStage
from stagecoach_api.references import NamedSource
from stagecoach_trainer.loop.job import HeldOutSet
from stagecoach_trainer.models.starting_point import position_change, start_from_model
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.samples.datasets import (
    check_lost_samples,
    conversation_held_out,
    conversation_shard,
    is_conversation,
    text_held_out,
)
from stagecoach_trainer.samples.hindsight import COUNTS
from stagecoach_trainer.samples.plan import MixedPlan, Planner, phase_settings
from stagecoach_trainer.samples.token_cache import TokenShard
from stagecoach_trainer.samples.token_masking import TokenMasking, filler_token, mask_phases, masked_share
from stagecoach_trainer.stage_parts.training import Prepared, check_before_loading, train_and_save
from stagecoach_trainer.text.templates import apply_template


def run(config: SftStage, context: StageContext) -> StageOutcome:
    """Train on conversations, and on ranked answers as `hindsight` sets.

    The output is a model folder or a PEFT adapter, with a tokenizer that has the chat template.

    Raises UserError for incompatible data, model or settings; Interrupted and Diverged as `train` does.
    """
    check_before_loading(config, from_nothing=False)
    settings = phase_settings(config, [source.label for source in config.data])
    change = position_change(config.sequence_length, warn=context.progress.warn)
    start = start_from_model(context, config, config.model, change)
    warnings = apply_template(start.tokenizer, config.template)
    shards = {
        source.label: conversation_shard(
            context, source, start.tokenizer, config.loss, config.too_long, config.sequence_length, config.hindsight
        )
        for source in config.data
    }
    check_lost_samples({name: shard.counts for name, shard in shards.items()}, config.max_dropped_share)
    plan = Planner(shards, context.seed, config.packing).plan(settings)
    held_out = tuple(_held_out(config, context, source, start.tokenizer) for source in config.held_out.sets)
    plan, figures = _masked(config, context, plan, start.tokenizer)
    warnings += _unused_hindsight(config, shards)
    return train_and_save(config, context, Prepared(start, shards, plan, held_out, tuple(warnings), figures))


def _masked(
    config: SftStage, context: StageContext, plan: MixedPlan, tokenizer: Any
) -> tuple[MixedPlan, Mapping[str, float]]:
    """Return the plan with input tokens masked in all its rows if `hindsight` makes chains, and the masked share."""
    hindsight = config.hindsight
    if hindsight is None or hindsight.mode is not HindsightMode.CHAIN or not hindsight.max_masked_share:
        return plan, {}
    masking = TokenMasking(hindsight.max_masked_share, filler_token(tokenizer), context.seed)
    return MixedPlan(mask_phases(plan.phases, masking)), {"hindsight.hiddenShare": masked_share(plan, masking)}


def _unused_hindsight(config: SftStage, shards: Mapping[str, TokenShard]) -> list[str]:
    """Return a warning if `hindsight` is set and no data set has ranked answers."""
    if config.hindsight is None or any(shard.counts.get(name) for shard in shards.values() for name in COUNTS):
        return []
    return ["`hindsight` is set, but no data set has preference records (`pairs`, `comparison` or `ranked`)"]


def _held_out(config: SftStage, context: StageContext, source: NamedSource, tokenizer: Any) -> HeldOutSet:
    """Return a set to measure on: all tokens of text, or the tokens of conversations that carry loss."""
    length, most = config.sequence_length, config.held_out.max_tokens
    if is_conversation(context, source):
        share = config.max_dropped_share
        return conversation_held_out(context, source, tokenizer, config.loss, length, most, share, config.hindsight)
    return text_held_out(context, source, tokenizer, length, most)
