"""Loading a model: a Hugging Face folder, or an artifact of another stage with the chain of adapters below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from stagecoach_api.artifacts import CARD, ModelCard, ResolvedInput, output_prefix
from stagecoach_api.references import Reference
from stagecoach_api.training import NewRows
from stagecoach_trainer.models.resize import check_sizes, grow, num_rows
from stagecoach_trainer.models.safety import (
    ADAPTER_CONFIG,
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
    """What sits on a model's body, by transformers' class that loads it."""

    LANGUAGE_MODEL = "AutoModelForCausalLM"
    CLASSIFIER = "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, and what is known of it."""

    model: Any
    """A PreTrainedModel; with `merge=False` a PeftModel where the source is an adapter."""

    tokenizer: Any | None
    """Its own vocabulary. None: the folder has none."""

    card: ModelCard
    """What `stagecoach.json` says; for a folder from outside: whole weights."""

    path: Path
    """The local folder it was loaded from."""

    source: ResolvedInput
    """Where it was found."""

    def require_tokenizer(self) -> Any:
        """Return the vocabulary. Raises UserError where the folder has none."""
        if self.tokenizer is None:
            raise UserError(f"{self.path}: the model's folder has no vocabulary; name one as the stage's `tokenizer`")
        return self.tokenizer


def load_model(
    context: StageContext,
    source: Reference | ResolvedInput,
    dtype: torch.dtype = torch.float32,
    merge: bool = True,
    change_config: ConfigChange | None = None,
) -> LoadedModel:
    """Load the model that `source` names, on the CPU.

    An adapter is put on its base, which is loaded the same way, grown as the adapter's card says. `merge` folds it
    into the weights; without it the newest adapter stays on top, ready to be trained on.
    `change_config` may edit the configuration before weights are loaded (positions, dropout).
    Raises UserError for pickles, code in the folder, unsound files, weights that are missing or left over, and a
    vocabulary of another size than the model.
    """
    found = context.input(source) if isinstance(source, Reference) else source
    path = context.fetch_resolved(found)
    require_folder(path)
    card = read_card(path)
    if card.reward is not None:
        raise UserError(f"{path}: it is a reward model, which scores answers; a language model is needed here")
    if card.adapter:
        return _load_adapter(context, found, path, card, dtype, merge, change_config)
    if not (path / "config.json").is_file() and (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{path}: a PEFT adapter without {CARD}, so its base is unknown here; merge it into its base first (PEFT)"
        )
    model = load_folder(path, dtype, change_config)
    tokenizer = own_tokenizer(path)
    if tokenizer is not None:
        check_sizes(model, tokenizer, str(path))
    return LoadedModel(model, tokenizer, card, path, found)


def read_card(path: Path) -> ModelCard:
    """Return `stagecoach.json` of a model's folder; a folder from outside has whole weights."""
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
    """Load a whole model from a folder in Hugging Face layout: safetensors only, every weight present, none left over.

    Raises UserError.
    """
    import transformers
    from transformers import AutoConfig

    check_model_folder(path)
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: transformers cannot read the configuration: {error}") from error
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
    return model


def _check_loaded(path: Path, report: dict[str, Any]) -> None:
    """transformers fills what is missing with random weights and only warns; here it is an error."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(item) for item in report.get(problem) or ())
        if names:
            word = problem.removesuffix("_keys")
            raise UserError(
                f"{path}: {len(names)} {word} weights ({', '.join(names[:3])}): they do not belong to config.json"
            )


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can read. None: there is no such limit (ALiBi)."""
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found


def own_tokenizer(path: Path) -> Any | None:
    """Return the vocabulary in a model's folder. None: it has none."""
    if any((path / name).is_file() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE)):
        return load_tokenizer(path)
    return None


# -- adapters ----------------------------------------------------------------------------------------------------------


def _load_adapter(
    context: StageContext,
    found: ResolvedInput,
    path: Path,
    card: ModelCard,
    dtype: torch.dtype,
    merge: bool,
    change_config: ConfigChange | None,
) -> LoadedModel:
    weights = check_adapter_folder(path)
    if card.base is None:
        raise UserError(f"{path / CARD}: an adapter without `base`; the file is damaged")
    below = locate_base(card.base, found, context.resolved.storage_uri)
    base = load_model(context, below, dtype, merge=True, change_config=change_config)
    tokenizer = load_tokenizer(path)
    if card.new_rows is not None and len(tokenizer) > num_rows(base.model):
        grow(base.model, base.tokenizer, tokenizer, NewRows(card.new_rows), card.resize_seed)
    check_sizes(base.model, tokenizer, str(path))
    model = apply_adapter(base.model, path, weights, trainable=not merge)
    return LoadedModel(model.merge_and_unload(safe_merge=True) if merge else model, tokenizer, card, path, found)


def locate_base(base: ResolvedInput, adapter: ResolvedInput, storage_uri: str) -> ResolvedInput:
    """Return where an adapter's base lies. A card names an artifact by its key: it is looked for in the store of the
    adapter itself, or in the run's."""
    if base.stage_digest is None or base.uri != output_prefix(base.stage_digest):
        return base
    root = storage_uri
    if adapter.stage_digest is not None and adapter.uri.endswith("/" + output_prefix(adapter.stage_digest)):
        root = adapter.uri.removesuffix("/" + output_prefix(adapter.stage_digest))
    return base.model_copy(update={"uri": f"{root.rstrip('/')}/{base.uri}"})


def name_base(source: ResolvedInput, storage_uri: str) -> ResolvedInput:
    """Return `source` as a card names it: an artifact of the run's store by its key."""
    if source.stage_digest is None:
        return source
    key = output_prefix(source.stage_digest)
    return source.model_copy(update={"uri": key}) if source.uri == f"{storage_uri.rstrip('/')}/{key}" else source


def apply_adapter(base: Any, path: Path, weights: Path, trainable: bool) -> Any:
    """Return `base` with the adapter in `path` on it. Raises UserError where a weight of the file found no place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        model = PeftModel.from_pretrained(
            base, str(path), is_trainable=trainable, autocast_adapter_dtype=False, low_cpu_mem_usage=False
        )
    except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        raise UserError(f"{path}: PEFT cannot load the adapter: {error}") from error
    placed = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(str(weights), "pt") as file:
        stored = set(file.keys())
    if stored != set(placed):
        odd = sorted(stored ^ set(placed))
        raise UserError(f"{path}: {len(odd)} adapter weights do not fit the base model ({', '.join(odd[:3])})")
    return model
