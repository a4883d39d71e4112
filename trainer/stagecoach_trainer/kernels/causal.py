"""Parts of a causal language model that training uses: decoder, head, and a module that returns a batch's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_trainer.batches.collate import RowBatch
from stagecoach_trainer.kernels.cross_entropy import Scratch, cross_entropy_sum, cross_entropy_sum_through
from stagecoach_trainer.runtime.errors import UserError

LOGIT_TWISTS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings by which other architectures change the logits after the head; the chunked loss would ignore them."""

WORTH_TRIMMING = 0.9
"""Share of positions with loss below which selecting them costs less than computing all positions."""


class DecoderLoss(nn.Module):
    """A module that owns a model and computes a loss from the last hidden states of its decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.positions_keyword: str | None = None
        """Keyword by which the decoder returns the states at given positions only; set by `accelerate`."""

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        raise NotImplementedError


class CausalLoss(DecoderLoss):
    """The loss of next-token prediction. Owns the model, so that ZeRO-3 gathers the head's weight for the chunked
    loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.through_module = False
        """Call the head as a module even if its weight alone could be used; set by ZeRO-3 for a wrapped head."""
        self.leak: float | None = None
        """Largest relative change that one packed sample causes in another (`packing_check`); None before the check."""
        self._scratch = Scratch()
        causal = causal_model(model)
        self._parts = (_decoder(causal), _head(causal))  # a tuple, so they are registered once, through `model`

    @property
    def decoder(self) -> nn.Module:
        return self._parts[0]

    @property
    def head(self) -> nn.Module:
        return self._parts[1]

    def hidden(self, batch: RowBatch, **keywords: Tensor) -> Tensor:
        """Return the last hidden states [B, T, D]. There is no mask and no cache: with either, packed samples leak."""
        output = self.decoder(
            input_ids=batch.tokens, position_ids=batch.positions, attention_mask=None, use_cache=False, **keywords
        )
        state: Tensor = output.last_hidden_state
        return state

    def forward(self, batch: RowBatch, scale: float) -> Tensor:
        """Return `scale` · summed negative log-likelihood of the batch, in nats, an fp32 scalar."""
        hidden, loss_at = self._states(batch)
        weight = None if self.through_module else head_weight(self.head)
        if weight is None:
            vocabulary = int(causal_model(self.model).config.vocab_size)
            return cross_entropy_sum_through(self.head, hidden, loss_at, batch.targets, vocabulary, scale)
        bias = getattr(self.head, "bias", None)
        return cross_entropy_sum(hidden, weight, loss_at, batch.targets, scale, bias, scratch=self._scratch)

    def _states(self, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states [N, D] and the indices of those with loss [M]."""
        num_targets, num_places = len(batch.targets), batch.tokens.numel()
        if self.positions_keyword is None or not 0 < num_targets < WORTH_TRIMMING * num_places:
            return self.hidden(batch).flatten(0, 1), batch.loss_at
        states = self.hidden(batch, **{self.positions_keyword: batch.loss_at}).flatten(0, 1)
        return states, torch.arange(num_targets, device=states.device)


def causal_model(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def output_layer(model: nn.Module) -> nn.Module:
    """Return the last layer: the language-model head, or the linear layer of a reward model."""
    causal = causal_model(model)
    head = causal.get_output_embeddings()
    layer: nn.Module = causal.score if head is None else head
    return layer


def head_weight(head: nn.Module) -> Tensor | None:
    """Return the head's effective weight [V, D], or None if the head is more than a matrix."""
    if isinstance(head, nn.Linear):
        return head.weight
    saved = getattr(head, "modules_to_save", None)  # peft's copy of a layer trained in full
    if saved is not None and isinstance(saved, nn.ModuleDict) and len(saved) == 1:  # several would need the active one
        return head_weight(next(iter(saved.values())))
    rows: Any = getattr(head, "token_adapter", head)  # peft's trained rows, as an auxiliary or as the adapter itself
    if hasattr(rows, "get_merged_weights") and not rows.disable_adapters:
        merged: Tensor = rows.get_merged_weights(rows.active_adapters)
        return merged
    return None


def _decoder(causal: Any) -> nn.Module:
    decoder = getattr(causal, getattr(causal, "base_model_prefix", "") or "model", None)
    if not isinstance(decoder, nn.Module):
        raise UserError(f"{type(causal).__name__} is not a decoder with a head, as LLaMA is; it cannot be trained")
    return decoder


def _head(causal: Any) -> nn.Module:
    head = causal.get_output_embeddings()
    twists = [name for name in LOGIT_TWISTS if getattr(causal.config, name, None) not in (None, 1, 1.0)]
    if head is None or twists:
        what = f"sets {', '.join(twists)}" if twists else "has no language-model head"
        raise UserError(
            f"{type(causal).__name__} {what}, which the training loss does not support; use a LLaMA-like model"
        )
    assert isinstance(head, nn.Module)  # noqa: S101 - for the type checker: transformers returns modules
    return head


def set_rope_theta(model: nn.Module, theta: float) -> bool:
    """Set the base of the rotary embedding, effective from the next forward pass; return False if it is set already.

    The configuration is changed too, so that a saved model keeps the base.
    """
    causal = causal_model(model)
    rope = causal.config.rope_parameters
    if rope.get("rope_theta") == theta:
        return False
    rope["rope_theta"] = theta
    rotary: Any = _decoder(causal).rotary_emb
    fresh = type(rotary)(config=causal.config)
    with torch.no_grad():
        rotary.inv_freq.copy_(fresh.inv_freq)
        rotary.original_inv_freq = rotary.inv_freq.clone()  # dynamic scaling returns to these
    rotary.attention_scaling = fresh.attention_scaling
    return True
