"""`export`: write a release in Hugging Face layout, and prove on the reloaded files that it computes the same as the
model it was made from. Without the proof, nothing is published."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stagecoach_api.artifacts import REPORT, REPORT_TEXT, ModelCard
from stagecoach_api.conversation import Role
from stagecoach_api.generation import ReleasedGeneration
from stagecoach_api.kinds.export import ExportStage
from stagecoach_trainer.engine.precision import DTYPES
from stagecoach_trainer.evaluation.proof import Divergence, StoredLogProbs, proof_rows
from stagecoach_trainer.evaluation.report import figure, samples_text, table, write_json
from stagecoach_trainer.generation.generation import answer_samples
from stagecoach_trainer.models.load import (
    LoadedModel,
    apply_adapter,
    load_folder,
    load_model,
    positions_of,
    untie_differing,
)
from stagecoach_trainer.models.placement import compute_device, place
from stagecoach_trainer.models.rehearsal import rehearse_saving
from stagecoach_trainer.models.release_adapter import release_adapter
from stagecoach_trainer.models.safety import check_adapter_folder
from stagecoach_trainer.models.save import save_model
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.templates import Renderer, message_of
from stagecoach_trainer.text.vocabulary import open_publicly

MERGE_KL = 1e-3
"""Limit of the mean KL, in nats per token, between the models before and after merging adapters in fp32. It does not
depend on `proof.maxKl`, which allows for rounding to the released precision."""

SAMPLE_ROWS = 8


@dataclass
class ExportReport:
    """The released files and the results of their proof."""

    model: str
    adapter: bool
    precision: str
    num_parameters: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    """Size in bytes by weight file."""

    proof: dict[str, Divergence] = field(default_factory=dict)
    """Divergence by compared step: `merge`, `release`."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        return {f"proof.{name}Kl": found.mean_kl for name, found in self.proof.items()}


def run(config: ExportStage, context: StageContext) -> StageOutcome:
    """Write the release and prove it. Raises UserError if the proof fails, so that nothing is published."""
    report = ExportReport(model=config.model.key, adapter=not config.merge_adapters, precision=config.precision.value)
    source = _load(config, context)
    tokenizer = source.require_tokenizer()
    _set_chat_template(tokenizer, config, report)
    before = _store_log_probs(source, config, context)
    base: Path | None = None
    if config.merge_adapters:
        _release_model(source, config, context, before, report)
    else:
        base = _release_adapter(source, config, context, report)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    del source  # its memory is needed for the reloaded release
    gc.collect()
    _prove(config, context, before, vocabulary, report, base)
    _write(report, context)
    return StageOutcome(metrics=report.metrics)


# -- before ------------------------------------------------------------------------------------------------------------


def _load(config: ExportStage, context: StageContext) -> LoadedModel:
    """Load the model in fp32, without merging its adapter."""
    context.progress.report("load model")
    source = load_model(context, config.model, merge=False)
    if not config.merge_adapters and not source.card.adapter:
        raise UserError(
            f"mergeAdapters: false, but {config.model.key} is not an adapter: its weights are whole; remove the field"
        )
    return source


def _set_chat_template(tokenizer: Any, config: ExportStage, report: ExportReport) -> None:
    if config.chat_template is None:
        return
    if tokenizer.chat_template is not None and tokenizer.chat_template != config.chat_template:
        report.notes.append("`chatTemplate` replaces the template that the model was trained with")
    tokenizer.chat_template = config.chat_template
    try:
        Renderer(tokenizer).prompt([message_of(Role.USER, "?")])
    except UserError as error:
        raise UserError(f"chatTemplate: {error}") from error


def _store_log_probs(source: LoadedModel, config: ExportStage, context: StageContext) -> StoredLogProbs:
    """Store the model's log-probabilities before it is changed."""
    context.progress.report("proof: before")
    model = place(source.model, torch.float32, compute_device())
    text = model.config.get_text_config()  # of a model that also reads images or audio, the part that reads text
    rows = proof_rows(text.vocab_size, config.proof.tokens, context.seed, positions_of(text))
    return StoredLogProbs(model, rows, context.work / "proof")


# -- releasing ---------------------------------------------------------------------------------------------------------


def _release_model(
    source: LoadedModel, config: ExportStage, context: StageContext, before: StoredLogProbs, report: ExportReport
) -> None:
    """Merge in fp32, compare, cast and save."""
    model = source.model
    if source.card.adapter:
        context.progress.report("merge adapters")
        model = model.merge_and_unload(safe_merge=True)
        report.proof["merge"] = before.compare(model)
        _require(report.proof["merge"], MERGE_KL, "merging the adapters")
    if untie_differing(model):
        report.notes.append(
            "input embedding and head differ, so they are released apart (`tie_word_embeddings: false`)"
        )
    if not source.card.adapter:
        rehearse_saving(model, source.tokenizer, source.path)
    report.num_parameters = sum(parameter.numel() for parameter in model.parameters())
    context.progress.report("save model")
    save_model(
        model,
        source.tokenizer,
        source.path,
        context.output,
        ModelCard(adapter=False),
        dtype=DTYPES[config.precision],
        max_shard_bytes=config.max_shard_bytes,
        generation=released_settings(config.generation or ReleasedGeneration(), model.generation_config),
        base=source.path,
    )


def released_settings(chosen: ReleasedGeneration, base: Any) -> dict[str, Any]:
    """Return the fields of `generation_config.json` that replace those of `base`."""
    settings: dict[str, Any] = {}
    if chosen.temperature == 0:
        settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif chosen.temperature is not None:
        # transformers samples from the 50 likeliest tokens if `top_k` is not set; 0 is off.
        settings = {"do_sample": True, "temperature": chosen.temperature, "top_k": base.top_k or 0}
    if chosen.top_p is not None:
        settings["top_p"] = chosen.top_p
    if chosen.max_new_tokens is not None:
        settings["max_new_tokens"] = chosen.max_new_tokens
    return settings


def _release_adapter(source: LoadedModel, config: ExportStage, context: StageContext, report: ExportReport) -> Path:
    """Save the adapter so that plain PEFT opens it; return the folder of its base."""
    report.precision = "as trained"
    report.num_parameters = sum(
        parameter.numel() for name, parameter in source.model.named_parameters() if "lora_" in name
    )
    context.progress.report("save adapter")
    base, note = release_adapter(context, source, config.base_model, DTYPES[config.precision], config.max_shard_bytes)
    report.notes.append(note)
    return base


# -- proof -------------------------------------------------------------------------------------------------------------


def _prove(
    config: ExportStage,
    context: StageContext,
    before: StoredLogProbs,
    vocabulary: dict[str, int],
    report: ExportReport,
    base: Path | None,
) -> None:
    """Open the written files as other programs do, compare them with the model before, and generate the samples.

    `base`: folder of the base of a released adapter.
    """
    context.progress.report("proof: reload")
    tokenizer = open_publicly(context.output)
    if tokenizer.get_vocab() != vocabulary:
        raise UserError("proof: the released vocabulary differs from the model's; nothing is published")
    model = place(_reload(context.output, base), torch.float32, compute_device())
    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise UserError("proof: the released model has fewer rows than its vocabulary has pieces; nothing is published")
    report.proof["release"] = before.compare(model)
    _require(report.proof["release"], config.proof.max_kl, f"the release in {report.precision}")
    report.weights = {
        path.relative_to(context.output).as_posix(): path.stat().st_size
        for path in sorted(context.output.rglob("*.safetensors"))
    }
    if config.samples is not None:
        report_progress = partial(context.progress.report, "samples", unit="answers")
        report.samples = answer_samples(config.samples, model, tokenizer, SAMPLE_ROWS, context.seed, report_progress)


def _reload(output: Path, base: Path | None) -> Any:
    if base is None:
        return load_folder(output)
    return apply_adapter(load_folder(base), output, check_adapter_folder(output), trainable=False)


def _require(found: Divergence, limit: float, what: str) -> None:
    if not found.mean_kl <= limit:  # also true if the KL is NaN
        raise UserError(
            f"proof: {what} changed the model: mean KL {found.mean_kl:.3g} nats per token (worst token "
            f"{found.max_kl:.3g}), allowed are {limit:g}; nothing is published. A release in fp32 shows whether "
            "rounding is the cause; `proof.maxKl` sets the limit"
        )


# -- report ------------------------------------------------------------------------------------------------------------


def _write(report: ExportReport, context: StageContext) -> None:
    proof = {
        name: {"meanKl": found.mean_kl, "maxKl": found.max_kl, "sameLikeliest": found.same_first}
        for name, found in report.proof.items()
    }
    write_json(
        {
            "model": report.model,
            "adapter": report.adapter,
            "precision": report.precision,
            "parameters": report.num_parameters,
            "weights": report.weights,
            "metrics": report.metrics,
            "proof": proof,
            "samples": report.samples,
            "notes": report.notes,
        },
        context.output / REPORT,
    )
    (context.output / REPORT_TEXT).write_text(_text(report), encoding="utf-8")


def _text(report: ExportReport) -> str:
    kind = "adapter" if report.adapter else "model"
    rows = [
        (name, figure(found.mean_kl), figure(found.max_kl), f"{100 * found.same_first:.2f} %")
        for name, found in report.proof.items()
    ]
    parts = [f"# Release\n\nFrom `{report.model}`: {kind}, {report.num_parameters:,} parameters, {report.precision}.\n"]
    parts += [f"> {note}\n" for note in report.notes]
    parts.append(table(("file", "bytes"), [(name, f"{size:,}") for name, size in report.weights.items()]))
    parts.append(
        "## Proof\n\nReloaded, and compared with the model before, in fp32, in nats per token.\n\n"
        + table(("step", "mean KL", "worst KL", "same likeliest token"), rows)
    )
    if report.samples:
        parts.append("## Samples\n\n" + samples_text(report.samples))
    return "\n".join(parts)
