"""Load a model: a Hugging Face folder, or an artifact of another stage with the chain of adapters it is based on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from stagecoach_api.artifacts import CARD, ModelCard, ResolvedInput, output_prefix, storage_of, uri_below
from stagecoach_api.model_folders import ADAPTER_CONFIG, BASE_FOLDER, CONFIG
from stagecoach_api.references import Reference
from stagecoach_api.training import NewRows
from stagecoach_trainer.models.merging import merge_adapter
from stagecoach_trainer.models.resize import check_sizes, grow
from stagecoach_trainer.models.safety import (
    check_adapter_folder,
    check_model_folder,
    read_json,
    require_folder,
)
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.vocabulary import SENTENCEPIECE_FILE, TOKENIZER_FILE, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ConfigChange = Callable[["PreTrainedConfig"], None]


class Head(StrEnum):
    """Head of a model, by the class of transformers that loads it."""

    LANGUAGE_MODEL = "AutoModelForCausalLM"
    CLASSIFIER = "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with its vocabulary, card and origin."""

    model: Any
    """A PreTrainedModel, or a PeftModel if the source is an adapter that was not merged."""

    tokenizer: Any | None
    """Its own vocabulary. None if the folder has none."""

    card: ModelCard
    """Content of `stagecoach.json`; for a folder without one, a card of whole weights."""

    path: Path
    """Local folder from which it was loaded."""

    source: ResolvedInput
    """Resolved location and digest of the source."""

    def require_tokenizer(self) -> Any:
        """Return the vocabulary. Raises UserError if the folder has none."""
        if self.tokenizer is None:
            raise UserError(f"{self.path}: the model's folder has no vocabulary; name one as the stage's `tokenizer`")
        return self.tokenizer


def load_model(
    context: StageContext,
    source: Reference | ResolvedInput,
    dtype: torch.dtype = torch.float32,
    merge: bool = True,
    change_config: ConfigChange | None = None,
    grows: bool = False,
) -> LoadedModel:
    """Load the model that `source` names, on the CPU.

    An adapter is applied to its base, which is loaded the same way and grown as the adapter's card specifies. `merge`
    merges it into the weights; otherwise the newest adapter stays separate, ready for more training.
    `change_config` may edit the configuration before weights are loaded (positions, dropout). `grows`: the caller adds
    the rows that the model lacks for its vocabulary.
    Raises UserError for pickles, code in the folder, corrupt files, missing or unexpected weights, a vocabulary larger
    than the model unless it `grows`, and an adapter that cannot be merged exactly.
    """
    resolved = context.input(source) if isinstance(source, Reference) else source
    path = context.fetch_resolved(resolved)
    context.progress.report("load model")
    require_folder(path)
    card = read_card(path)
    if card.reward is not None:
        raise UserError(f"{path}: it is a reward model, which scores answers; give a language model")
    if card.adapter:
        return _load_adapter(context, resolved, path, card, dtype, merge, change_config)
    if not (path / "config.json").is_file() and (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{path}: a PEFT adapter without {CARD}, so its base is unknown; merge it into its base with PEFT first"
        )
    model = load_folder(path, dtype, change_config)
    tokenizer = own_tokenizer(path)
    if tokenizer is not None and not grows:
        check_sizes(model, tokenizer, str(path))
    return LoadedModel(model, tokenizer, card, path, resolved)


def read_card(path: Path) -> ModelCard:
    """Return the model card of a folder; a folder without `stagecoach.json` has whole weights."""
    if not (path / CARD).is_file():
        return ModelCard(adapter=False)
    try:
        return ModelCard.model_validate(read_json(path / CARD))
    except ValidationError as error:
        raise UserError(f"{path / CARD}: {error}") from error


def load_folder(
    path: Path,
    dtype: torch.dtype = torch.float32,
    change_config: ConfigChange | None = None,
    head: Head = Head.LANGUAGE_MODEL,
) -> Any:
    """Load whole weights from a folder in Hugging Face layout: safetensors only, none missing, none unexpected.

    Weights in FP8 are dequantised, and the model is from then on one of plain weights. Raises UserError for anything
    else.
    """
    import transformers

    check_model_folder(path)
    config, quantized = _read_config(path)
    if change_config is not None:
        change_config(config)
    try:
        loader: Any = getattr(transformers, head.value)
        model, report = loader.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: transformers cannot load the model: {error}") from error
    _check_loaded(path, report)
    untie_differing(model)
    if quantized:
        _forget_quantization(path, model, dtype)
    return model


def untie_differing(model: Any) -> bool:
    """Mark a model as untied if its head and its input embedding differ; return whether its configuration changed.

    transformers does not tie such matrices of a folder, whatever its configuration states, but would replace the head
    with the embedding once the folder is written again (transformers#45127).
    """
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    if head is None or head.weight is embedding or not getattr(model.config, "tie_word_embeddings", False):
        return False
    if head.weight.shape == embedding.shape and bool((embedding == head.weight).all()):
        return False
    model.config.tie_word_embeddings = False
    return True


def _read_config(path: Path) -> tuple[Any, bool]:
    """Return the configuration, and whether the weights are quantised; then it asks for dequantised ones."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: transformers cannot read the configuration: {error}") from error
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        # On a GPU transformers would keep FP8, which has no gradient and cannot be merged into.
        config.quantization_config = {**settings, "dequantize": True}
    return config, settings is not None


def _forget_quantization(path: Path, model: Any, dtype: torch.dtype) -> None:
    """Make a dequantised model an ordinary one in `dtype`, which is saved with plain weights.

    Raises UserError if some weights are still quantised.
    """
    left = sorted(name for name, weight in model.named_parameters() if weight.dtype.itemsize < 2)
    if left or getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            f"{path}: {len(left)} weights are still quantised after loading ({', '.join(left[:3])}); give the model "
            "they were made from"
        )
    for weight in model.parameters():  # those that were not quantised come in the number format of the file
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    # Its conversions read scales, and there is no way back; those of the architecture apply when it is saved.
    model._weight_conversions = None


def _check_loaded(path: Path, report: dict[str, Any]) -> None:
    """Raise UserError for missing or unexpected weights: transformers initialises them randomly and only warns."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(item) for item in report.get(problem) or ())
        if names:
            kind = problem.removesuffix("_keys")
            raise UserError(
                f"{path}: {len(names)} {kind} weights ({', '.join(names[:3])}): the weights do not match config.json"
            )


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that a model can read, or None if it has no limit (ALiBi)."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def own_tokenizer(path: Path) -> Any | None:
    """Return the vocabulary in a model's folder, or None if it has none."""
    if any((path / name).is_file() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE)):
        return load_tokenizer(path)
    return None


# -- adapters ----------------------------------------------------------------------------------------------------------


def _load_adapter(
    context: StageContext,
    source: ResolvedInput,
    path: Path,
    card: ModelCard,
    dtype: torch.dtype,
    merge: bool,
    change_config: ConfigChange | None,
) -> LoadedModel:
    weights = check_adapter_folder(path)
    base = load_base(context, source, path, card, dtype, change_config)
    tokenizer = load_tokenizer(path)
    # The adapter's stage grew the base before it trained; the same seed gives the same rows again.
    if card.new_rows is not None:
        grow(base.model, base.tokenizer, tokenizer, NewRows(card.new_rows), card.resize_seed, card.old_rows)
    check_sizes(base.model, tokenizer, str(path))
    model = apply_adapter(base.model, path, weights, trainable=not merge)
    if merge:
        model = merge_adapter(model, str(path), context.world)
    return LoadedModel(model, tokenizer, card, path, source)


def load_base(
    context: StageContext,
    source: ResolvedInput,
    path: Path,
    card: ModelCard,
    dtype: torch.dtype = torch.float32,
    change_config: ConfigChange | None = None,
) -> LoadedModel:
    """Load the base of the adapter in `path`: the folder `base` in it, or else what its card names."""
    inside = shipped_base(path)
    if inside is not None:
        return LoadedModel(
            load_folder(inside, dtype, change_config), own_tokenizer(inside), read_card(inside), inside, source
        )
    if card.base is None:
        raise UserError(f"{path / CARD}: an adapter without `base`; the file is corrupt")
    base = locate_base(card.base, source, context.resolved.storage_uri)
    return load_model(context, base, dtype, merge=True, change_config=change_config, grows=True)


def shipped_base(path: Path) -> Path | None:
    """Return the folder with the base in an adapter's folder; None if the base is elsewhere."""
    return path / BASE_FOLDER if (path / BASE_FOLDER / CONFIG).is_file() else None


def locate_base(base: ResolvedInput, adapter: ResolvedInput, storage_uri: str) -> ResolvedInput:
    """Return the location of an adapter's base.

    A card names an artifact by its key, which is looked up in the adapter's store or, for an adapter from elsewhere, in
    the run's.
    """
    if base.stage_digest is None or base.uri != output_prefix(base.stage_digest):
        return base
    own = None if adapter.stage_digest is None else storage_of(adapter.uri, adapter.stage_digest)
    return base.model_copy(update={"uri": uri_below(storage_uri if own is None else own, base.uri)})


def name_base(source: ResolvedInput, storage_uri: str) -> ResolvedInput:
    """Return `source` as cards name it: artifacts of the run's store by key, so that the store can be moved."""
    if source.stage_digest is None:
        return source
    if storage_of(source.uri, source.stage_digest) != storage_uri.rstrip("/"):
        return source
    # The key does not depend on the attempt that made it: it is part of the content, which equal work has in common.
    return source.model_copy(update={"uri": output_prefix(source.stage_digest)})


def apply_adapter(base: Any, path: Path, weights: Path, trainable: bool) -> Any:
    """Return `base` with the adapter in `path` applied. Raises UserError if the weights do not fit the base."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        model = PeftModel.from_pretrained(
            base, str(path), is_trainable=trainable, autocast_adapter_dtype=False, low_cpu_mem_usage=False
        )
    except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        raise UserError(f"{path}: PEFT cannot load the adapter: {error}") from error
    # PEFT ignores weights that fit no layer, and leaves layers without weights at their initial values.
    placed = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(str(weights), "pt") as file:
        stored = set(file.keys())
    if stored != set(placed):
        unmatched = sorted(stored ^ set(placed))
        names = ", ".join(unmatched[:3])
        raise UserError(f"{path}: {len(unmatched)} adapter weights do not fit the base model ({names})")
    return model
