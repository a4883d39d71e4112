"""Prove that what a stage saves is what it trained: by a rehearsal before the work, and by opening the folder after it.

T tokens of the probe, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagecoach_api.artifacts import ModelCard, ResolvedInput, RewardCard
from stagecoach_api.model_folders import BASE_FOLDER
from stagecoach_api.store import external_digest, list_external
from stagecoach_api.stores.base import file_uri
from stagecoach_api.training import NewRows
from stagecoach_trainer.models.adapter_chain import chain_of
from stagecoach_trainer.models.load import (
    Head,
    LoadedModel,
    apply_adapter,
    load_folder,
    locate_base,
    name_base,
    shipped_base,
)
from stagecoach_trainer.models.merging import outputs_of
from stagecoach_trainer.models.rehearsal import rehearse_saving
from stagecoach_trainer.models.resize import num_rows
from stagecoach_trainer.models.reward import load_reward_adapter
from stagecoach_trainer.models.safety import check_adapter_folder
from stagecoach_trainer.models.save import save_adapter, save_model
from stagecoach_trainer.models.starting_point import StartingPoint
from stagecoach_trainer.models.trainable import TrainableModel, join_rows
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.probes import PROBES

PROBE_TOKENS = 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference of outputs, relative to the largest output, by the number format of the weights. The same code on
the same weights differs by rounding at most: by nothing on a CPU, and by the order of sums on a GPU."""


def rehearse(context: StageContext, start: StartingPoint, adapter: bool) -> None:
    """Try before the work what is needed after it: configurations, vocabulary and whole weights. Done by rank 0.

    `adapter`: whether only an adapter will be saved. Raises UserError if it will not be possible to save.
    """
    if not context.world.is_main:
        return
    model = start.model.get_base_model() if hasattr(start.model, "get_base_model") else start.model
    rehearse_saving(model, start.tokenizer, start.vocabulary, weights=not adapter, root=context.work)


# -- saving --------------------------------------------------------------------------------------------------------


def save_result(
    context: StageContext, start: StartingPoint, trained: TrainableModel, reward: RewardCard | None = None
) -> None:
    """Write the trained model or adapter with vocabulary and card to the stage's output, and prove it.

    `reward`: entry of a reward model in the card. `trained` has no weights afterwards.
    """
    model, old_rows = trained.model, start.new_rows.start if start.new_rows else None
    base: Path | None = None
    if trained.adapter:
        card = adapter_card(context, start).model_copy(update={"old_rows": old_rows, "reward": reward})
        save_adapter(model, start.tokenizer, start.vocabulary, context.output, card)
        base = public_base(context, start, _is_continued(start.model))
    else:
        join_rows(model)
        card = ModelCard(adapter=False, old_rows=old_rows, reward=reward)
        source = None if start.loaded is None else start.loaded.path
        save_model(model, start.tokenizer, start.vocabulary, context.output, card, base=source)
    if trained.adapter and base is None and reward is None:
        return  # no folder of a language model alone is its base; what was written has been compared with the weights
    probe = SavedProbe.of(model, start.tokenizer)
    model.to("meta")  # frees its memory for the model that is loaded
    if trained.adapter and reward is not None:
        probe.compare(context.output, load_reward_adapter(context, output_of(context), context.output, card))
    else:
        probe.prove(context.output, base, Head.LANGUAGE_MODEL if reward is None else Head.CLASSIFIER)


def output_of(context: StageContext) -> ResolvedInput:
    """Return this stage's own output as an input, by the path that it has until it is published."""
    return ResolvedInput(uri=file_uri(context.output), digest=context.resolved.digest)


def adapter_card(context: StageContext, start: StartingPoint) -> ModelCard:
    """Return the card of an adapter that was trained from `start`. Raises UserError if its base is not stored."""
    loaded, storage = start.loaded, context.resolved.storage_uri
    if loaded is None:
        raise UserError("trainable.lora: an adapter needs a `model` as its base; a new `architecture` is not stored")
    if _is_continued(start.model):
        # A continued adapter keeps its base and its record of grown rows.
        old_base = _released_base(context, loaded) or loaded.card.base
        base = None if old_base is None else name_base(locate_base(old_base, loaded.source, storage), storage)
        return loaded.card.model_copy(update={"base": base})
    base_source: ResolvedInput = name_base(loaded.source, storage)
    seed = start.seed if start.grown is NewRows.RANDOM else None
    return ModelCard(adapter=True, base=base_source, new_rows=start.grown and start.grown.value, resize_seed=seed)


def _released_base(context: StageContext, loaded: LoadedModel) -> ResolvedInput | None:
    """Return the base that is in the adapter's own folder; None if it does not."""
    if shipped_base(loaded.path) is None:
        return None
    resolved = context.resolved
    uri = f"{loaded.source.uri.rstrip('/')}/{BASE_FOLDER}"
    entries = list_external(uri, resolved.storage_endpoint, resolved.storage_region)[1]
    return ResolvedInput(uri=uri, digest=external_digest(entries))


def _is_continued(trained_on: Any) -> bool:
    from peft import PeftModel

    return isinstance(trained_on, PeftModel)


def public_base(context: StageContext, start: StartingPoint, is_continued: bool) -> Path | None:
    """Return the folder of whole weights that a trained adapter belongs to.

    None if no such folder exists, because the adapter was trained over another adapter, or over rows that the stage
    added; `export` releases such an adapter with its base.
    """
    loaded = start.loaded
    if loaded is None or start.grown is not None:
        return None
    if not loaded.card.adapter:
        return loaded.path
    if not is_continued:
        return None
    chain = chain_of(context, loaded.source)
    return None if chain.is_grown or len(chain.adapters) > 1 else chain.root


# -- the proof ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedProbe:
    """The outputs of a trained model on a short text, to be compared with those of its files."""

    ids: Tensor
    """Token ids [1, T]."""

    outputs: Tensor
    """Logits, fp32: [1, T, V], or [1, 1] of a reward model."""

    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> SavedProbe:
        """Measure a model in memory."""
        weight = model.get_input_embeddings().weight
        ids = _probe_ids(tokenizer, num_rows(model))
        return cls(ids, outputs_of(model, ids).cpu(), model.dtype, weight.device)

    def prove(self, output: Path, base: Path | None, head: Head) -> None:
        """Open the saved folder by transformers' and PEFT's own classes, and compare.

        `base`: folder of the base if the output is an adapter. Raises UserError if the outputs differ.
        """
        if base is None:
            model = load_folder(output, self.dtype, head=head)
        else:
            model = load_folder(base, self.dtype, head=head)
            model = apply_adapter(model, output, check_adapter_folder(output), trainable=False)
        self.compare(output, model)

    def compare(self, output: Path, model: Any) -> None:
        """Compare with the model that was opened from `output`. Raises UserError if the outputs differ."""
        found = outputs_of(model.to(self.device), self.ids).cpu()
        largest = float(self.outputs.abs().max())
        difference = float((found - self.outputs).abs().max()) if found.shape == self.outputs.shape else float("inf")
        if not difference <= TOLERANCE[self.dtype] * max(largest, 1.0):  # also true if one of them is NaN
            raise UserError(
                f"{output}: the saved model, opened by transformers, differs from the trained one: its outputs by "
                f"{difference:.3g} of {largest:.3g}; nothing is published. This architecture cannot be saved exactly"
            )


def _probe_ids(tokenizer: Any, rows: int) -> Tensor:
    ids = [token for text in PROBES[:4] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    kept = [token for token in ids if token < rows and token != tokenizer.pad_token_id][:PROBE_TOKENS]
    return torch.tensor([kept or [rows - 1]])
