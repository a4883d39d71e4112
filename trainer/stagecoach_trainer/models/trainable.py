"""Choose the trainable parameters: all, the embedding and the head, only their new rows, or low-rank adapters.

V rows in all, V0 old ones, N = V - V0 new ones, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stagecoach_api.training import LoraTraining, Rows, Trainable
from stagecoach_trainer.models.adapter_rehearsal import lost_adapter_weights
from stagecoach_trainer.models.lora import ADAPTER, add_adapter
from stagecoach_trainer.models.merging import Probe
from stagecoach_trainer.models.resize import is_tied, require_new_rows, row_modules
from stagecoach_trainer.runtime.errors import UserError


@dataclass(frozen=True)
class TrainableModel:
    """A model with `requires_grad` set on the parameters to train."""

    model: Any
    adapter: bool
    """Whether the model is a PeftModel and the stage's output is its adapter."""

    notes: tuple[str, ...]
    """Descriptions of what is trained. The report contains them, so rewording one changes the artifact."""


def choose_trainable(model: Any, trainable: Trainable, new_rows: range, seed: int) -> TrainableModel:
    """Return the model prepared for training. `new_rows`: ids of the rows added when the vocabulary grew.

    Raises UserError for adapter targets that the model lacks, and for training new rows if there are none.
    """
    if trainable.full is not None:
        model.requires_grad_(True)
        return TrainableModel(model, False, ("all parameters are trained",))
    if trainable.embeddings is not None:
        return _embeddings_only(model, trainable.embeddings.rows, new_rows)
    lora = trainable.lora or LoraTraining()
    if lora.continue_adapter:
        return _continue_adapter(model)
    adapted, notes = add_adapter(model, lora, new_rows, seed)
    return TrainableModel(adapted, True, notes)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the numbers of trained and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trained": sum(size for size, trained in sizes if trained), "all": sum(size for size, _ in sizes)}


# -- embedding and head ------------------------------------------------------------------------------------------------


def _embeddings_only(model: Any, rows: Rows, new_rows: range) -> TrainableModel:
    model.requires_grad_(False)
    if rows is Rows.ALL:
        for matrix in row_modules(model):
            matrix.weight.requires_grad_(True)
        return TrainableModel(model, False, ("all rows of the embedding and the head are trained",))
    require_new_rows(new_rows, "trainable.embeddings.rows: new", "`rows: all`")
    split_rows(model, new_rows)
    note = f"{len(new_rows)} new rows of the embedding and the head are trained; old rows are no parameter"
    return TrainableModel(model, False, (note,))


class SplitRows(nn.Module):
    """A matrix [V, D] in two parts: the other rows [V - N, D], a frozen parameter, and new rows [N, D], a trained one.

    New rows come after V0 old ones, and before surplus rows, if the model has any. As a separate parameter, the other
    rows are out of reach of weight decay and optimiser state. The attribute names are those of PEFT's layer for trained
    rows (`trainable_tokens_delta`, `get_merged_weights`), so that the training loop handles both alike; new rows may be
    in fp32 while the others are in bf16.
    """

    disable_adapters = False
    active_adapters = (ADAPTER,)

    def __init__(self, old_rows: nn.Parameter, new_rows: nn.Parameter, first_new: int) -> None:
        super().__init__()
        self.old_rows = old_rows
        self.trainable_tokens_delta = new_rows
        self._first_new = first_new

    @property
    def new_rows(self) -> torch.Tensor:
        """The new rows [N, D], in the number format of the others; gradients flow to them."""
        return self.trainable_tokens_delta.to(self.old_rows.dtype)

    @property
    def parts(self) -> list[torch.Tensor]:
        """The rows in order: old ones [V0, D], new ones [N, D], and surplus ones, if any."""
        before, after = self.old_rows[: self._first_new], self.old_rows[self._first_new :]
        return [before, self.new_rows, after] if len(after) else [before, self.new_rows]

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix [V, D]; gradients flow to the new rows."""
        return torch.cat(self.parts)

    def get_merged_weights(self, active_adapters: Sequence[str]) -> torch.Tensor:
        """Return `weight`."""
        del active_adapters
        return self.weight


class SplitEmbedding(SplitRows):
    """An embedding of which only the new rows are trained."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T] -> [B, T, D]."""
        # Each id is looked up in both parts, clamped to a valid row, and the right result is selected: the shapes do
        # not depend on the ids.
        first, count = self._first_new, len(self.trainable_tokens_delta)
        other = F.embedding(torch.where(ids < first, ids, ids - count).clamp(min=0), self.old_rows)
        new = F.embedding((ids - first).clamp(0, count - 1), self.trainable_tokens_delta)
        is_new = (ids >= first) & (ids < first + count)
        return torch.where(is_new.unsqueeze(-1), new.to(other.dtype), other)


class SplitHead(SplitRows):
    """A head of which only the new rows are trained."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return torch.cat([F.linear(hidden, rows) for rows in self.parts], dim=-1)


def split_rows(model: Any, new_rows: range) -> None:
    """Replace embedding and head with split matrices, which share their parts if tied; `join_rows` undoes it."""
    tied = is_tied(model)
    old, new = _split(model.get_input_embeddings().weight, new_rows)
    head = model.get_output_embeddings()
    model.set_input_embeddings(SplitEmbedding(old, new, new_rows.start))
    if tied:
        model.set_output_embeddings(SplitHead(old, new, new_rows.start))
    elif head is not None:
        if getattr(head, "bias", None) is not None:
            raise UserError("trainable.embeddings.rows: new: the model's head has a bias; train `rows: all`")
        model.set_output_embeddings(SplitHead(*_split(head.weight, new_rows), new_rows.start))


def _split(weight: torch.Tensor, new_rows: range) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the other rows and the new rows of a matrix."""
    whole = weight.detach()
    others = torch.cat([whole[: new_rows.start], whole[new_rows.stop :]])
    return nn.Parameter(others, requires_grad=False), nn.Parameter(whole[new_rows.start : new_rows.stop].clone())


def join_rows(model: Any) -> None:
    """Replace split matrices with whole ones that include the trained rows, if the model has split matrices.

    Raises UserError if the model computes something else afterwards.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, SplitRows):
        return
    probe = Probe(model)
    tied = isinstance(head, SplitRows) and head.trainable_tokens_delta is embedding.trainable_tokens_delta
    rows, width = embedding.weight.shape
    whole = nn.Embedding(rows, width, _weight=embedding.weight.detach())
    model.set_input_embeddings(whole)
    if isinstance(head, SplitRows):
        weight = whole.weight if tied else nn.Parameter(head.weight.detach())
        # On the meta device, so that no memory is allocated and initialised for weights that are replaced at once.
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = weight
        model.set_output_embeddings(linear)
    probe.require_same(model, "trainable.embeddings: joining old and new rows")


# -- adapters ----------------------------------------------------------------------------------------------------------


def _continue_adapter(model: Any) -> TrainableModel:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise UserError(
            "trainable.lora.continueAdapter: `model` has whole weights, not an adapter; name the stage whose adapter "
            "is to be continued, or remove `continueAdapter` to start a new one"
        )
    lost = lost_adapter_weights(model.get_base_model(), model.peft_config[model.active_adapter])
    if lost:
        raise UserError(
            f"trainable.lora.continueAdapter: PEFT does not read {len(lost)} weights of this adapter back from its "
            f"files ({', '.join(lost[:3])}); start a new one over the merged `model`"
        )
    return TrainableModel(model, True, ("the adapter of `model` is trained on; its targets, rank and alpha are kept",))
