"""Merge an adapter into the weights, and prove that the model computes the same before and after.

A merge adds an adapter's product to a matrix. If another layer reads that matrix too (a head that is the embedding),
or PEFT cannot express the adapter as a change of it, the merged model is another one; only its outputs show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError

ROWS = 4
ROW_TOKENS = 4
"""A few tokens are enough, since every layer takes part in each; the first and the last id are among them."""

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


class Probe:
    """A model's outputs on a few rows, to be compared with those of the same model after a change of its form."""

    def __init__(self, model: Any) -> None:
        self._ids = _probe_ids(int(model.config.get_text_config().vocab_size))
        self._before = _outputs(model, self._ids)

    def require_same(self, model: Any, what: str) -> None:
        """Raise UserError if the outputs of `model` differ by more than rounding. `what` is the message's subject."""
        after = _outputs(model, self._ids)
        largest = float(self._before.abs().max())
        # Rounding may send a token of a mixture to another expert, which moves one row; a wrong merge moves all.
        halves = (slice(0, None, 2), slice(1, None, 2))
        moved = torch.stack([(after[half] - self._before[half]).abs().max() for half in halves])
        change = float(moved.min()) / max(largest, 1e-6)
        allowed = TOLERANCES[model.dtype]
        if not change <= allowed:  # not `>`: NaN is a change
            raise UserError(
                f"{what} changed the model: outputs of up to {largest:.3g} moved by {change:.2g} of that, allowed is "
                f"{allowed:g}. Layers that share a matrix, such as a head tied to the embedding, cannot be merged one "
                "by one: train an adapter without them, or all rows by `trainable.embeddings`"
            )


def _probe_ids(vocabulary: int) -> Tensor:
    """Return ids [B, T] spread evenly over the vocabulary, its first and last one included."""
    return torch.linspace(0, vocabulary - 1, ROWS * ROW_TOKENS).round().long().reshape(ROWS, ROW_TOKENS)


def _outputs(model: Any, ids: Tensor) -> Tensor:
    """Return the logits, or the scores of a reward model, in fp32; dropout is off."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # Row by row, because a classifier without a padding token refuses several.
            found = [model(input_ids=row[None].to(model.device), use_cache=False).logits for row in ids]
    finally:
        model.train(was_training)
    return torch.cat(found).float()
