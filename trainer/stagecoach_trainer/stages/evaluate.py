"""The `evaluate` stage: measure a model on held-out text, by exact match, by reward against rivals, and on lm-eval's
tasks; generate samples; check the metrics against the gates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stagecoach_api.kinds.evaluate import EvaluateStage, Rival
from stagecoach_api.references import Reference
from stagecoach_trainer.engine.precision import DTYPES
from stagecoach_trainer.evaluation.exact_match import measure_exact_match
from stagecoach_trainer.evaluation.gates import check_gates, metrics_to_come, require_known
from stagecoach_trainer.evaluation.held_out import measure_held_out
from stagecoach_trainer.evaluation.lm_eval_tasks import Harness, refuse_unavailable_tasks
from stagecoach_trainer.evaluation.report import EvaluationReport
from stagecoach_trainer.evaluation.reward_comparison import ModelAndTokenizer, compare_by_reward
from stagecoach_trainer.generation.generation import answer_samples
from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.models.placement import compute_device, place
from stagecoach_trainer.rewards import RewardSum
from stagecoach_trainer.runtime.context import StageContext, StageOutcome, World
from stagecoach_trainer.runtime.errors import GateFailed, Interrupted
from stagecoach_trainer.text.templates import apply_template

NO_TEMPLATE = "the tokenizer has no chat template and the stage names none: prompts are continued as plain text"


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated."""

    model: Any
    """A PreTrainedModel on its device, in the stage's precision, ready to measure."""

    tokenizer: Any


def run(config: EvaluateStage, context: StageContext) -> StageOutcome:
    """Run all measurements of the stage, write the reports, then check the gates.

    Raises:
        UserError: Inputs or settings are invalid.
        Interrupted: A stop was requested between two measurements.
        GateFailed: A gate with `onFailure: stop` was missed; the reports are written.
    """
    _refuse_unknown_gates(config)
    refuse_unavailable_tasks(config.lm_eval)
    report = EvaluationReport(model=config.model.key)
    subject = _load(config, context, report)
    for measurement in (_held_out, _exact_match, _rewards, _lm_eval, _samples):
        if context.stop.is_set():
            raise Interrupted("stopped between two measurements; the next attempt starts from the first one")
        measurement(config, context, subject, report)
    report.gates = check_gates(config.gates, report.metrics)
    report.warnings += [text for text in context.progress.warnings if text not in report.warnings]
    report.write(context.output, context.work / "logs")
    _stop_at_missed_gates(report)
    return StageOutcome(metrics={name: value for name, value in report.metrics.items() if math.isfinite(value)})


def _refuse_unknown_gates(config: EvaluateStage) -> None:
    """Raise UserError before the first measurement if a gate's metric will not be measured."""
    names = metrics_to_come(config)
    if names is not None:
        require_known(config.gates, names)


def _load(config: EvaluateStage, context: StageContext, report: EvaluationReport) -> Subject:
    subject = _open(config.model, config, context, report)
    generates = config.samples or config.exact_match or config.rewards
    if subject.tokenizer.chat_template is None and generates:
        report.warnings.append(NO_TEMPLATE)
    return subject


def _open(model: Reference, config: EvaluateStage, context: StageContext, report: EvaluationReport) -> Subject:
    """Load a model, with the stage's template, if any, applied to its tokenizer."""
    context.progress.report("load model")
    loaded = load_model(context, model)
    tokenizer = loaded.require_tokenizer()
    if config.template is not None or tokenizer.chat_template is not None:
        warnings = apply_template(tokenizer, config.template)
        report.warnings += [warning for warning in warnings if warning not in report.warnings]
    return Subject(place(loaded.model, DTYPES[config.precision], compute_device()), tokenizer)


def _held_out(config: EvaluateStage, context: StageContext, subject: Subject, report: EvaluationReport) -> None:
    for source in config.held_out:
        report_progress = partial(context.progress.report, f"held out {source.name}", unit="rows")
        found = measure_held_out(source, config, subject.model, subject.tokenizer, context, report_progress)
        report.metrics.update(found.metrics)
        report.held_out[source.name] = found.counts


def _exact_match(config: EvaluateStage, context: StageContext, subject: Subject, report: EvaluationReport) -> None:
    for task in config.exact_match:
        report_progress = partial(context.progress.report, f"exact match {task.name}", unit="answers")
        found = measure_exact_match(
            task, subject.model, subject.tokenizer, context, config.batch_rows, context.seed, report_progress
        )
        report.metrics.update(found.metrics)
        report.exact_match[task.name] = {
            "questions": found.num_questions,
            "right": found.num_right,
            "unended": found.num_unended,
            "cases": list(found.cases),
        }


def _rewards(config: EvaluateStage, context: StageContext, subject: Subject, report: EvaluationReport) -> None:
    for number, task in enumerate(config.rewards):
        rewards = RewardSum.build(
            task.rewards,
            replace(context, world=World()),  # only rank 0 evaluates
            compute_device(),
            config.precision,
            config.batch_rows,
            where=f"rewards[{number}].rewards",
        )
        rewards.require_domains({f"rewards[{number}].data.domain": task.on.domain})
        rewards.prepare()

        def open_rival(index: int, rivals: tuple[Rival, ...] = task.rivals) -> ModelAndTokenizer:
            rival = _open(rivals[index].model, config, context, report)
            return rival.model, rival.tokenizer

        report_progress = partial(context.progress.report, f"rewards {task.name}", unit="answers")
        found = compare_by_reward(
            task,
            rewards,
            (subject.model, subject.tokenizer),
            open_rival,
            context,
            config.batch_rows,
            context.seed,
            report_progress,
        )
        report.metrics.update(found.metrics)
        report.rewards[task.name] = found.as_json()


def _lm_eval(config: EvaluateStage, context: StageContext, subject: Subject, report: EvaluationReport) -> None:
    harness = Harness(subject.model, subject.tokenizer, config.batch_rows, context)
    for index, task in enumerate(config.lm_eval):
        context.progress.report(f"lm-eval {task.task or task.uri}", index, len(config.lm_eval), "tasks")
        found = harness.run(task, f"lmEval[{index}]")
        report.metrics.update(found.metrics)
        report.lm_eval.update({name: {"questions": count} for name, count in found.num_questions.items()})


def _samples(config: EvaluateStage, context: StageContext, subject: Subject, report: EvaluationReport) -> None:
    if config.samples is not None:
        report_progress = partial(context.progress.report, "samples", unit="answers")
        report.samples = answer_samples(
            config.samples, subject.model, subject.tokenizer, config.batch_rows, context.seed, report_progress
        )


def _stop_at_missed_gates(report: EvaluationReport) -> None:
    missed = [result.sentence for result in report.gates if result.stops]
    if missed:
        raise GateFailed("; ".join(missed))
