"""Merge an adapter into the weights, and prove that the model computes the same before and after.

A merge adds an adapter's product to a matrix. If another layer reads that matrix too (a head that is the embedding),
or PEFT cannot express the adapter as a change of it, the merged model is another one; only its outputs show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError

ROWS = 4
ROW_TOKENS = 4
"""A few tokens are enough, since every layer takes part in each; the first and the last id are among them."""

REHEARSED_RANK = 2
REHEARSED_SIZE = 0.05

TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest change of an output, as a share of the largest output, that is rounding. Measured over the families of the
tests, with adapters larger than the weights: 2e-6, 3e-2 and 4e-3. An adapter on a tied head, one hundredth as large as
the weights, moved outputs by 9e-2 when it was merged."""


def merge_adapter(model: Any, where: str, world: World) -> Any:
    """Return the model with its adapter merged into its weights.

    `where`: the beginning of the message. One rank proves the merge, which is the same on all.
    Raises UserError if the merge changes the model's outputs, or makes a weight infinite.
    """
    probe = None if not world.is_main else Probe(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{where}: PEFT cannot merge the adapter: {error}") from error
    if probe is not None:
        probe.require_same(merged, f"{where}: merging the adapter")
    return merged


def rehearse_merge(model: Any, layers: Sequence[str], experts: Sequence[str]) -> str | None:
    """Merge random adapters into these layers and fused experts, and take them out again; return what went wrong.

    None if the outputs before and after the merge are the same. Afterwards the model has the bits that it had.
    """
    from peft import LoraConfig, get_peft_model

    if not layers and not experts:
        return None
    names = [*(f"{layer}.weight" for layer in layers), *experts]
    # Other models may share the memory, so it is put back, with its bits, whether or not the merge replaced it.
    memory = {name: model.get_parameter(name).data for name in names}
    before = {name: weight.clone() for name, weight in memory.items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = LoraConfig(r=REHEARSED_RANK, target_modules=list(layers), target_parameters=list(experts) or None)
    adapted: Any = None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
            _randomize(adapted)
        probe = Probe(adapted)
        return probe.change(adapted.merge_and_unload(safe_merge=True))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # a layer that is called in another way
        if adapted is not None:
            adapted.unload()
        return f"{type(error).__name__}: {error}"
    finally:
        for name, weight in before.items():
            model.get_parameter(name).data = memory[name].copy_(weight)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def _randomize(adapted: Any) -> None:
    """Fill the second matrices, which begin as zeros, with numbers that make the product as large as the weights."""
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=REHEARSED_SIZE)


class Probe:
    """A model's outputs on a few rows, to be compared with those of the same model after a change of its form."""

    def __init__(self, model: Any) -> None:
        self._ids = _probe_ids(int(model.config.get_text_config().vocab_size))
        self._before = outputs_of(model, self._ids)

    def require_same(self, model: Any, what: str) -> None:
        """Raise UserError if the outputs of `model` differ by more than rounding. `what` is the message's subject."""
        change = self.change(model)
        if change is not None:
            raise UserError(
                f"{what} changed the model: {change}. Layers that share a matrix, such as a head tied to the "
                "embedding, cannot be merged one by one: train an adapter without them, or all rows by "
                "`trainable.embeddings`"
            )

    def change(self, model: Any) -> str | None:
        """Return by how much the outputs of `model` differ; None if that is rounding."""
        after = outputs_of(model, self._ids)
        largest = float(self._before.abs().max())
        # Rounding may send a token of a mixture to another expert, which moves one row; a wrong merge moves all.
        halves = (slice(0, None, 2), slice(1, None, 2))
        moved = torch.stack([(after[half] - self._before[half]).abs().max() for half in halves])
        change = float(moved.min()) / max(largest, 1e-6)
        allowed = TOLERANCES[model.dtype]
        if change <= allowed:  # not true for NaN, which is a change
            return None
        return f"outputs of up to {largest:.3g} moved by {change:.2g} of that, allowed is {allowed:g}"


def _probe_ids(vocabulary: int) -> Tensor:
    """Return ids [B, T] spread evenly over the vocabulary, its first and last one included."""
    return torch.linspace(0, vocabulary - 1, ROWS * ROW_TOKENS).round().long().reshape(ROWS, ROW_TOKENS)


def outputs_of(model: Any, ids: Tensor) -> Tensor:
    """Return the logits, or the scores of a reward model, in fp32; dropout is off."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # A classifier without a padding token refuses several rows.
            batches = ids.split(1) if model.get_output_embeddings() is None else (ids,)
            found = [model(input_ids=batch.to(model.device), use_cache=False).logits for batch in batches]
    finally:
        model.train(was_training)
    return torch.cat(found).float()
