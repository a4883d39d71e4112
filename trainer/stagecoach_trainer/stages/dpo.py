"""The `dpo` stage: train a policy on preferences without a reward model (DPO, IPO, KTO)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from stagecoach_api.kinds.dpo import DpoStage
from stagecoach_api.references import NamedSource
from stagecoach_trainer.align.answer_scores import scorer_of
from stagecoach_trainer.align.direct_held_out import DirectPreferenceSet
from stagecoach_trainer.align.direct_objective import DirectObjective, counting_of, grouping_of
from stagecoach_trainer.align.groups import sequences_of
from stagecoach_trainer.align.mismatched import PointedPlan, PointedUnit
from stagecoach_trainer.align.reference_table import ReferenceTable, Scorer, fill_table
from stagecoach_trainer.batches.rows import StepPlan
from stagecoach_trainer.data.notes import one_class_warnings
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from stagecoach_trainer.models.load import load_model, own_tokenizer
from stagecoach_trainer.models.save_check import TrainingLength, check_saving
from stagecoach_trainer.models.shipping import rehearse, save_result
from stagecoach_trainer.models.starting_point import StartingPoint, position_change
from stagecoach_trainer.models.trainable import TrainableModel, choose_trainable, count_parameters
from stagecoach_trainer.models.vocabularies import require_vocabulary_of_reference
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.groups import (
    LOST_ANSWERS,
    GroupShard,
    TokenSequence,
    check_left_out,
    check_lost_answers,
    measured_groups,
    plan_groups,
)
from stagecoach_trainer.samples.plan import MixedPlan
from stagecoach_trainer.samples.preferences import group_shard
from stagecoach_trainer.stage_parts.reports import training_text, write_report
from stagecoach_trainer.stage_parts.training import Prepared, check_before_loading, make_report, start_with_template


def run(config: DpoStage, context: StageContext) -> StageOutcome:
    """Train a policy on preferences; write a model folder or a PEFT adapter, with tokenizer.

    Raises:
        UserError: Data, models or settings are invalid or do not match each other.
        Interrupted: A stop was requested.
        Diverged: As `train`.
    """
    check_before_loading(config, from_nothing=False)
    continued = config.trainable.lora is not None and config.trainable.lora.continue_adapter
    start, warnings = start_with_template(context, config.model, config.template, config.sequence_length, not continued)
    rehearse(context, start, config.trainable.lora is not None)
    shards = {source.label: _shard(config, context, source, start.tokenizer) for source in config.data}
    check_lost_answers({name: shard.counts for name, shard in shards.items()}, config.max_dropped_share)
    warnings += one_class_warnings([shard.counts for shard in shards.values()])
    plan = plan_groups(shards, config, counting_of(config.loss), context.seed)
    warnings += _reference_point_warnings(config, plan)
    steps: StepPlan = plan if config.loss.kto is None else PointedPlan(plan, config.sequence_length, context.world.size)
    table = ReferenceTable()
    held_out = tuple(_held_out(config, context, source, start.tokenizer, table) for source in config.held_out.sets)
    trained = choose_trainable(start.model, config.trainable, start.new_rows, context.seed)
    parameters = count_parameters(trained.model)
    check_saving(context, start, trained, TrainingLength(config.checkpoints, plan.num_steps, parameters["trained"]))
    _score_with_reference(config, context, table, start, trained, [_drawn(steps), *(s.sequences for s in held_out)])
    objective = DirectObjective(config.loss, table, config.batch.micro_batch_rows or 1)
    result = train(TrainingJob(trained.model, config, steps, held_out, objective), context)
    if context.world.is_main:
        context.progress.report("save")
        save_result(context, start, trained)
        prepared = Prepared(start, {name: item.shard for name, item in shards.items()}, plan, (), tuple(warnings))
        report = make_report(prepared, result, trained.notes, parameters, result.metrics)
        columns = ("records", "groups", "answers", "pairs", "ties", *LOST_ANSWERS)
        write_report(context, report, training_text("dpo", report, columns))
    return StageOutcome(tokens=result.tokens, metrics=result.metrics)


# -- before training ---------------------------------------------------------------------------------------------------


def _shard(config: DpoStage, context: StageContext, source: Any, tokenizer: Any) -> GroupShard:
    return group_shard(context, source, tokenizer, config.sequence_length, grouping_of(config.loss))


def _held_out(
    config: DpoStage, context: StageContext, source: NamedSource, tokenizer: Any, table: ReferenceTable
) -> DirectPreferenceSet:
    """Return a held-out set: its first pairs or answers, up to `maxTokens` tokens."""
    shard = _shard(config, context, source, tokenizer)
    check_left_out(source.name, shard.counts, config.max_dropped_share, context.progress.warn)
    groups = measured_groups(shard, counting_of(config.loss), config.held_out.max_tokens, source.name)
    return DirectPreferenceSet(source.name, groups, config.loss, config.sequence_length, table)


def _reference_point_warnings(config: DpoStage, plan: MixedPlan) -> list[str]:
    """Return a warning if KTO's reference point cannot be estimated."""
    if config.loss.kto is None or plan.phases[0].per_step > 1:
        return []
    return ["KTO: a step has one answer, and no other prompt's to estimate the reference point from: it is 0"]


# -- the reference -----------------------------------------------------------------------------------------------------


def _drawn(steps: StepPlan) -> Iterator[TokenSequence]:
    """Yield the sequences in the order in which training uses them, repetitions included."""
    for step in range(steps.num_steps):
        units: Sequence[Any] = steps.rows(step)
        for unit in units:
            yield from sequences_of(unit.groups if isinstance(unit, PointedUnit) else [unit])
        if units and isinstance(units[0], PointedUnit):
            yield from units[0].sequences


def _score_with_reference(
    config: DpoStage,
    context: StageContext,
    table: ReferenceTable,
    start: StartingPoint,
    trained: TrainableModel,
    streams: Sequence[Iterator[TokenSequence]],
) -> None:
    """Add the reference's log-probabilities of all sequences to the table.

    The reference is loaded only if the cache lacks a window, and released afterwards.
    """
    # Without another reference the policy's initial weights are the reference, and no second model is loaded.
    own = config.reference is None or context.input(config.reference).digest == context.input(config.model).digest
    if not own:
        _check_vocabulary(config, context, start)
    with ExitStack() as stack:
        scorers: list[Scorer] = []

        def scorer() -> Scorer:
            if not scorers:
                model = trained.model if own else _load_reference(config, context)
                scorers.append(stack.enter_context(scorer_of(model, config, context.world)))
            return scorers[0]

        for stream in streams:
            fill_table(table, context, _reference_key(config, context, own), stream, scorer)


def _reference_key(config: DpoStage, context: StageContext, own: bool) -> dict[str, Any]:
    """Return everything except the answers that determines the reference's log-probabilities."""
    return {
        "model": context.input(config.model if own or config.reference is None else config.reference).digest,
        "trainable": config.trainable.model_dump(mode="json") if own else None,  # determines the number formats
        "precision": config.precision.value,
        "sequenceLength": config.sequence_length,
        "rows": config.batch.micro_batch_rows or 1,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _load_reference(config: DpoStage, context: StageContext) -> Any:
    reference = config.reference or config.model
    loaded = load_model(context, reference, change_config=position_change(config.sequence_length))
    loaded.model.requires_grad_(False)
    return loaded.model


def _check_vocabulary(config: DpoStage, context: StageContext, start: StartingPoint) -> None:
    """Raise UserError unless the reference has the policy's vocabulary: both receive the same ids."""
    path = context.fetch(config.reference or config.model)
    tokenizer = own_tokenizer(path)
    if tokenizer is None:
        raise UserError(
            f"reference: {path} has no tokenizer, so its vocabulary cannot be compared with the policy's; add it"
        )
    require_vocabulary_of_reference(start.tokenizer, tokenizer)
