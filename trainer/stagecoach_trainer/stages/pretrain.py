"""`pretrain`: next-token training on text, from scratch or from an existing model."""

from __future__ import annotations

from stagecoach_api.kinds.pretrain import PretrainStage
from stagecoach_trainer.batches.schedule import StepSchedule
from stagecoach_trainer.models.starting_point import (
    StartingPoint,
    position_change,
    start_from_model,
    start_from_scratch,
)
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.datasets import check_lost_samples, text_held_out, text_shard
from stagecoach_trainer.samples.plan import Planner, phase_schedules, phase_settings
from stagecoach_trainer.stage_parts.training import Prepared, check_before_loading, train_and_save


def run(config: PretrainStage, context: StageContext) -> StageOutcome:
    """Train on text; the output is a model folder or a PEFT adapter.

    Raises UserError for incompatible data, model or settings; Interrupted and Diverged as `train` does.
    """
    check_before_loading(config, from_nothing=config.architecture is not None)
    _check_positions(config)
    settings = phase_settings(config, [source.label for source in config.data], config.phases)
    start = _start(config, context, max(item.sequence_length for item in settings))
    shards = {source.label: text_shard(context, source, start.tokenizer) for source in config.data}
    check_lost_samples({name: shard.counts for name, shard in shards.items()}, config.max_dropped_share)
    plan = Planner(shards, context.seed).plan(settings)
    schedule = StepSchedule.of(config, plan.num_steps, phase_schedules(plan, config.phases))
    held_out = tuple(
        text_held_out(context, source, start.tokenizer, config.sequence_length, config.held_out.max_tokens)
        for source in config.held_out.sets
    )
    return train_and_save(config, context, Prepared(start, shards, plan, held_out, schedule=schedule))


def _check_positions(config: PretrainStage) -> None:
    changed = [config.rope_theta, config.rope_scaling, *(phase.rope_theta for phase in config.phases)]
    if config.trainable.lora is not None and any(item is not None for item in changed):
        raise UserError(
            "ropeTheta, ropeScaling: an adapter has no model configuration, so the change would be lost when it is "
            "loaded; train `full`, or make the change in a separate stage before the adapter"
        )
    if config.architecture is not None and config.rope_theta is not None:
        raise UserError("ropeTheta: set a new model's base in `architecture.ropeTheta`")


def _start(config: PretrainStage, context: StageContext, longest: int) -> StartingPoint:
    if config.architecture is not None and config.tokenizer is not None:
        start = start_from_scratch(context, config.architecture, config.tokenizer)
        if config.rope_scaling is not None or longest > config.architecture.max_position_embeddings:
            raise UserError(
                f"architecture.maxPositionEmbeddings: {config.architecture.max_position_embeddings} is less than the "
                f"longest `sequenceLength` {longest}; for a new model, raise it instead of setting `ropeScaling`"
            )
        return start
    if config.model is None:
        raise UserError("pretrain: set `model`, or `architecture` and `tokenizer`")
    rotated_later = any(phase.rope_theta is not None for phase in config.phases)
    change = position_change(longest, config.rope_theta, config.rope_scaling, rotated_later, context.progress.warn)
    return start_from_model(context, config, config.model, change)
