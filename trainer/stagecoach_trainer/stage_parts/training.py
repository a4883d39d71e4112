"""Steps that the training stages have in common: check settings, load, train, save, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagecoach_api.conversation import Template
from stagecoach_api.references import Reference
from stagecoach_api.training import MeasuredTraining
from stagecoach_trainer.batches.schedule import StepSchedule
from stagecoach_trainer.loop.job import HeldOutSet, TrainingJob, TrainingResult
from stagecoach_trainer.models.save_check import TrainingLength, check_saving
from stagecoach_trainer.models.shipping import rehearse, save_result
from stagecoach_trainer.models.starting_point import StartingPoint, position_change, start_unchanged
from stagecoach_trainer.models.trainable import choose_trainable, count_parameters
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.runtime.progress_log import figures_text
from stagecoach_trainer.samples.datasets import LOST_SAMPLES
from stagecoach_trainer.samples.hindsight import COUNTS
from stagecoach_trainer.samples.plan import MixedPlan, PlannedPhase, RowUnits
from stagecoach_trainer.samples.token_cache import TokenShard
from stagecoach_trainer.stage_parts.reports import training_text, write_report
from stagecoach_trainer.text.templates import apply_template

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Inputs of a training stage, before the trainable parameters are chosen."""

    start: StartingPoint
    shards: Mapping[str, TokenShard]
    """Training sets by label."""

    plan: MixedPlan
    held_out: tuple[HeldOutSet, ...]
    warnings: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the data, available before training."""

    schedule: StepSchedule | None = None
    """None if the configuration sets the same schedule for all steps."""


def check_before_loading(config: MeasuredTraining, from_nothing: bool) -> None:
    """Raise UserError for invalid settings, before any model or data is read."""
    names = [source.label for source in config.data]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"data: two sets are named {twice[0]!r}; give each a unique `name`")
    if config.early_stop is not None and config.early_stop.set not in [source.name for source in config.held_out.sets]:
        raise UserError(
            f"earlyStop.set: {config.early_stop.set!r} is not in `heldOut.sets`; add it, or name one of its sets"
        )
    if from_nothing and config.trainable.lora is not None:
        raise UserError("trainable.lora: an adapter needs a `model`; an `architecture` is trained in full")


def start_with_template(
    context: StageContext, model: Reference, template: Template | None, sequence_length: int, merge: bool = True
) -> tuple[StartingPoint, list[str]]:
    """Return the model, with a chat template on its tokenizer, and warnings for the report.

    `template`: None for the model's own. `merge`: merge an adapter into the weights. Raises UserError if there is none.
    """
    change = position_change(sequence_length, warn=context.progress.warn)
    start = start_unchanged(context, model, change, merge=merge)
    warnings = apply_template(start.tokenizer, template)
    for warning in warnings:
        context.progress.warn(warning)
    return start, warnings


def train_and_save(config: MeasuredTraining, context: StageContext, prepared: Prepared) -> StageOutcome:
    """Train, write the model and the report to the output, and return the stage's outcome."""
    from stagecoach_trainer.loop.loop import train

    start = prepared.start
    rehearse(context, start, config.trainable.lora is not None)
    trained = choose_trainable(start.model, config.trainable, start.new_rows, context.seed)
    parameters = count_parameters(trained.model)
    length = TrainingLength(config.checkpoints, prepared.plan.num_steps, parameters["trained"])
    check_saving(context, start, trained, length)
    announce(context, prepared, parameters)
    job = TrainingJob(trained.model, config, prepared.plan, prepared.held_out, schedule=prepared.schedule)
    result = train(job, context)
    metrics = dict(result.metrics) | {"packing.usefulShare": useful_share(prepared.plan)} | dict(prepared.figures)
    if context.world.is_main:
        context.progress.report("save")
        save_result(context, start, trained)
        report = make_report(prepared, result, trained.notes, parameters, metrics)
        columns = ("records", "samples", "tokens", *LOST_SAMPLES)
        text = training_text(context.resolved.kind, report, columns, _ranked_lines(report["data"]))
        write_report(context, report, text)
    return StageOutcome(tokens=result.tokens, metrics=metrics)


def announce(context: StageContext, prepared: Prepared, parameters: Mapping[str, int]) -> None:
    """Log what is about to be trained, on which data; report the warnings known by now."""
    if not context.world.is_main:
        return
    for name, shard in prepared.shards.items():
        log.info("data %s: %s", name, figures_text(shard.counts))
    log.info("%s of %s parameters are trained", f"{parameters['trained']:,}", f"{parameters['all']:,}")
    for phase in prepared.plan.phases:
        settings = phase.settings
        log.info("%s: %d steps of %s tokens a row", settings.name, phase.num_steps, f"{settings.sequence_length:,}")
    for warning in prepared.warnings:
        context.progress.warn(warning)


# -- report ------------------------------------------------------------------------------------------------------------


def useful_share(plan: MixedPlan) -> float:
    """Return the share of positions in rows that hold tokens, over all phases that draw rows; 1 if none does."""
    tokens = positions = 0
    for phase in plan.phases:
        for units in phase.units:
            if isinstance(units, RowUnits):
                tokens += units.num_tokens
                positions += len(units) * phase.settings.sequence_length
    return tokens / positions if positions else 1.0


def make_report(
    prepared: Prepared,
    result: TrainingResult,
    notes: Sequence[str],
    parameters: Mapping[str, int],
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of `report.json`. It must not depend on when or where the stage ran."""
    return {
        "data": {name: dict(shard.counts) for name, shard in prepared.shards.items()},
        "heldOutData": {item.name: dict(item.counts) for item in prepared.held_out if item.counts},
        "history": [dict(point) for point in result.history],
        "metrics": dict(sorted(metrics.items())),
        "parameters": dict(parameters),
        "phases": [_phase_report(phase, list(prepared.shards)) for phase in prepared.plan.phases],
        "steps": result.steps,
        "stoppedEarly": result.steps < prepared.plan.num_steps,
        "tokens": result.tokens,
        "trained": list(notes),
        "vocabulary": {
            "newRows": len(prepared.start.new_rows),
            "rows": prepared.start.num_rows,
            "tokens": len(prepared.start.tokenizer),
        },
        "warnings": [*prepared.warnings, *prepared.start.warnings],
    }


def _phase_report(phase: PlannedPhase, names: Sequence[str]) -> dict[str, Any]:
    settings = phase.settings
    if settings.weights is None:
        drawn = {" + ".join(names): phase.mix.drawn[0]}
    else:
        weighted = [name for name, weight in zip(names, settings.weights, strict=True) if weight > 0]
        drawn = dict(zip(weighted, phase.mix.drawn, strict=True))
    kind = "rows" if settings.batch.tokens is not None else "samples"
    return {
        "name": settings.name,
        "steps": phase.num_steps,
        "sequenceLength": settings.sequence_length,
        f"{kind}PerStep": phase.per_step,
        kind: drawn,
    }


def _ranked_lines(data: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return lines with the counts of ranked answers, for each data set that has any."""
    found = {
        name: [f"{count} {counts[count]:,}" for count in COUNTS if counts.get(count)] for name, counts in data.items()
    }
    return [
        line
        for name, counts in found.items()
        if counts
        for line in ("", f"Ranked answers of {name}: {', '.join(counts)}.")
    ]
