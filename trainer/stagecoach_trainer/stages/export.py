"""`export`: write a release in Hugging Face layout, and prove on the reloaded files that it computes the same as the
model it was made from. Without the proof, nothing is published."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from stagecoach_api.artifacts import REPORT, REPORT_TEXT, ModelCard, ResolvedInput
from stagecoach_api.kinds.export import ExportStage
from stagecoach_api.store import external_digest, list_external
from stagecoach_api.stores.base import file_uri
from stagecoach_trainer.engine.precision import DTYPES
from stagecoach_trainer.evaluation.proof import Divergence, StoredLogProbs, proof_rows
from stagecoach_trainer.evaluation.report import figure, samples_text, table, write_json
from stagecoach_trainer.generation.generation import answer_samples, end_ids, generation_settings
from stagecoach_trainer.models.load import LoadedModel, load_folder, load_model, locate_base, name_base, positions_of
from stagecoach_trainer.models.placement import compute_device, place
from stagecoach_trainer.models.save import save_adapter, save_model
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.templates import Renderer
from stagecoach_trainer.text.vocabulary import load_tokenizer

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
    _set_chat_template(tokenizer, config)
    before = _store_log_probs(source, config, context)
    if config.merge_adapters:
        _release_model(source, config, context, before, report)
    else:
        _release_adapter(source, context, report)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    del source  # its memory is needed for the reloaded release
    gc.collect()
    _prove(config, context, before, vocabulary, report)
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


def _set_chat_template(tokenizer: Any, config: ExportStage) -> None:
    if config.chat_template is None:
        return
    tokenizer.chat_template = config.chat_template
    try:
        Renderer(tokenizer).render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    except UserError as error:
        raise UserError(f"chatTemplate: {error}") from error


def _store_log_probs(source: LoadedModel, config: ExportStage, context: StageContext) -> StoredLogProbs:
    """Store the model's log-probabilities before it is changed."""
    context.progress.report("proof: before")
    model = place(source.model, torch.float32, compute_device())
    rows = proof_rows(model.config.vocab_size, config.proof.tokens, context.seed, positions_of(model.config))
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
    if untie(model):
        report.notes.append(
            "input embedding and head differ, so they are released apart (`tie_word_embeddings: false`)"
        )
    report.num_parameters = sum(parameter.numel() for parameter in model.parameters())
    ends = end_ids(model, source.tokenizer)
    model.generation_config = type(model.generation_config)()  # drops the base's settings; the stage's replace them
    context.progress.report("save model")
    save_model(
        model,
        source.tokenizer,
        source.path,
        context.output,
        ModelCard(adapter=False),
        dtype=DTYPES[config.precision],
        max_shard_bytes=config.max_shard_bytes,
        generation=generation_settings(config.generation) | ({"eos_token_id": ends} if len(ends) > 1 else {}),
    )


def untie(model: Any) -> bool:
    """Mark the model as untied if head and input embedding differ; return whether its configuration changed.

    Loading such a model as tied would replace the head with the embedding (transformers#45127).
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if not model.config.tie_word_embeddings or embedding is head or bool((embedding == head).all()):
        return False
    model.config.tie_word_embeddings = False
    return True


def _release_adapter(source: LoadedModel, context: StageContext, report: ExportReport) -> None:
    """Save the adapter unchanged; its card names the base by its key in this run's store."""
    if source.card.base is None:
        raise UserError(f"{source.path}: the adapter's card names no base; the file is corrupt")
    storage = context.resolved.storage_uri
    base = name_base(locate_base(source.card.base, source.source, storage), storage)
    card = source.card.model_copy(update={"base": base})
    report.precision = "as trained"
    report.num_parameters = sum(
        parameter.numel() for name, parameter in source.model.named_parameters() if "lora_" in name
    )
    report.notes.append(f"an adapter: it needs its base, {base.uri} (content {base.digest[:12]}…)")
    context.progress.report("save adapter")
    save_adapter(source.model, source.tokenizer, source.path, context.output, card)


# -- proof -------------------------------------------------------------------------------------------------------------


def _prove(
    config: ExportStage, context: StageContext, before: StoredLogProbs, vocabulary: dict[str, int], report: ExportReport
) -> None:
    """Reload the written files, compare them with the model before, and generate the samples."""
    context.progress.report("proof: reload")
    tokenizer = load_tokenizer(context.output)
    if tokenizer.get_vocab() != vocabulary:
        raise UserError("proof: the released vocabulary differs from the model's; nothing is published")
    model = place(_reload(config, context), torch.float32, compute_device())
    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise UserError("proof: the released model has fewer rows than its vocabulary has pieces; nothing is published")
    report.proof["release"] = before.compare(model)
    _require(report.proof["release"], config.proof.max_kl, f"the release in {report.precision}")
    report.weights = {path.name: path.stat().st_size for path in sorted(context.output.glob("*.safetensors"))}
    if config.samples is not None:
        report_progress = partial(context.progress.report, "samples", unit="answers")
        report.samples = answer_samples(config.samples, model, tokenizer, SAMPLE_ROWS, context.seed, report_progress)


def _reload(config: ExportStage, context: StageContext) -> Any:
    if config.merge_adapters:
        return load_folder(context.output)
    uri = file_uri(context.output)
    written = ResolvedInput(uri=uri, digest=external_digest(list_external(uri)[1]))
    return load_model(context, written, merge=False).model


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
