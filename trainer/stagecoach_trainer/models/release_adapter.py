"""Release an adapter so that plain PEFT opens it: one adapter, on a base that others have or that it brings along."""

from __future__ import annotations

from pathlib import Path

import torch

from stagecoach_api.artifacts import ModelCard, ResolvedInput
from stagecoach_api.model_folders import BASE_FOLDER, CONFIG, UNNAMED_BASE
from stagecoach_trainer.models.adapter_chain import (
    AdapterChain,
    PlainLora,
    chain_of,
    concatenated,
    copy_base,
    read_plain_lora,
)
from stagecoach_trainer.models.load import LoadedModel, name_base
from stagecoach_trainer.models.safety import read_json
from stagecoach_trainer.models.save import save_adapter, save_model, write_adapter, write_card
from stagecoach_trainer.models.save_vocabulary import save_vocabulary
from stagecoach_trainer.models.token_ids import end_ids
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError


def release_adapter(
    context: StageContext, source: LoadedModel, base_name: str | None, dtype: torch.dtype, max_shard_bytes: int
) -> tuple[Path, str]:
    """Write the adapter of `source` to the output; return the folder of its base, and a note for the report.

    Args:
        context: The stage's context.
        source: The adapter, loaded without merging it into its base.
        base_name: Public name or path of the base; None if the base is to be released in the folder `base`.
        dtype, max_shard_bytes: Of a base that has to be written because it exists nowhere: rows were added to it, it
            was quantised, or adapters that cannot be one adapter with this one were merged into it.

    Raises UserError if there is such a base and `base_name` is given.
    """
    chain = chain_of(context, source.source)
    lora = _one_adapter(chain)
    is_public = not chain.is_grown and "quantization_config" not in read_json(chain.root / CONFIG)
    if not is_public or (lora is None and len(chain.adapters) > 1):
        return _with_changed_base(context, source, chain, base_name, dtype, max_shard_bytes)
    card = ModelCard(adapter=True, base=_named(context, chain, base_name), old_rows=source.card.old_rows)
    if lora is None or len(chain.adapters) == 1:
        save_adapter(source.model, source.tokenizer, source.path, context.output, card, base_name)
    else:
        config = {**lora.config, "base_model_name_or_path": base_name or UNNAMED_BASE}
        write_adapter(lora.weights, config, context.output)
        save_vocabulary(source.tokenizer, source.path, context.output)
        write_card(card, context.output)
    joined = f"{len(chain.adapters)} adapters as one; " if len(chain.adapters) > 1 else ""
    if base_name is not None:
        digest = "" if card.base is None else f" (content {card.base.digest[:12]}…; the name is not checked)"
        return chain.root, f"an adapter: {joined}its base is {base_name}{digest}"
    folder = context.output / BASE_FOLDER
    copy_base(chain.root, folder, end_ids(source.require_tokenizer()))
    return folder, f"an adapter: {joined}its base is released with it, unchanged, in `{BASE_FOLDER}`"


def _one_adapter(chain: AdapterChain) -> PlainLora | None:
    """Return the adapters of a chain as one; None if one of them is more than plain LoRA."""
    plain = [read_plain_lora(link.path) for link in chain.adapters]
    found = [adapter for adapter in plain if adapter is not None]
    return concatenated(found) if len(found) == len(plain) else None


def _named(context: StageContext, chain: AdapterChain, base_name: str | None) -> ResolvedInput | None:
    """Return the base as the card names it: an artifact by its key, another model by its public name."""
    if base_name is None or chain.root_input is None:
        return None
    named = name_base(chain.root_input, context.resolved.storage_uri)
    return named if named.stage_digest is not None else named.model_copy(update={"uri": base_name})


def _with_changed_base(
    context: StageContext,
    source: LoadedModel,
    chain: AdapterChain,
    base_name: str | None,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> tuple[Path, str]:
    """Write the adapter as it is, and the base that it was trained on."""
    why = "rows were added to it" if chain.is_grown else "it was quantised"
    if len(chain.adapters) > 1:
        why = "other adapters were merged into it"
    if base_name is not None:
        raise UserError(
            f"baseModel: the adapter was not trained on {base_name} as others have it: {why}; remove the field, and "
            "the base is released with the adapter, or release a merged model (`mergeAdapters: true`)"
        )
    card = ModelCard(adapter=True, old_rows=source.card.old_rows)
    save_adapter(source.model, source.tokenizer, source.path, context.output, card)
    folder = context.output / BASE_FOLDER
    folder.mkdir()
    base = source.model.unload()
    whole = ModelCard(adapter=False)
    save_model(base, source.tokenizer, source.path, folder, whole, dtype, max_shard_bytes, base=chain.root)
    return folder, f"an adapter: its base is released with it in `{BASE_FOLDER}`, as it was trained on: {why}"
