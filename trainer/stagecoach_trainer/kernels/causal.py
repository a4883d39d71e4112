"""Parts of a causal language model that training uses: decoder, head, and a module that returns a batch's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_trainer.batches.collate import RowBatch, collate
from stagecoach_trainer.kernels.cross_entropy import Scratch, cross_entropy_sum, cross_entropy_sum_through
from stagecoach_trainer.kernels.own_head import OwnHead, autocast_to, states_and_added_loss
from stagecoach_trainer.kernels.proof_rows import ProofRows
from stagecoach_trainer.runtime.errors import UserError

ROUNDING = 1e-6
"""Relative difference of two fp32 means over the same logits below which they are the same."""

ADDED_ROUNDING = 0.05
"""Relative difference of two computations of routers' losses in bf16, where rounding moves tokens between experts."""

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

    def computed(self, rows: ProofRows) -> Tensor:
        """Return what this module computes for a few rows, by its own means [K]. Called with and without gradients."""
        raise NotImplementedError

    def expected(self, rows: ProofRows) -> Tensor:
        """Return the same as transformers' own forward pass computes it. Called without gradients first."""
        raise NotImplementedError

    def head_difference(self, states: Tensor) -> float:
        """Return by how much the model's own logits of states [rows, D] differ from those of this module.

        The mean difference relative to the mean logit: exactly 0 if both are the same product.
        """
        del states
        return 0.0

    def use_own_head(self, own: bool) -> None:
        """Let the model's own code compute logits from hidden states, or the head alone."""

    def take_added(self) -> float | None:
        """Return the part that the model itself added to the losses since the last call; None if it adds nothing."""
        return None


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
        self._parts = (decoder_in(causal), _head(causal))  # a tuple, so they are registered once, through `model`
        self._own_head: OwnHead | None = None
        """Computes logits instead of the head's weight alone; set if the weight alone does not give the model's."""
        self._adds_loss = False
        """The model adds a loss of its own, such as its routers', which is trained as well."""
        self._added: Tensor | None = None

    @property
    def decoder(self) -> nn.Module:
        return self._parts[0]

    @property
    def head(self) -> nn.Module:
        return self._parts[1]

    def hidden(self, batch: RowBatch, **keywords: Tensor) -> Tensor:
        """Return the last hidden states [B, T, D]. There is no mask and no cache: with either, packed samples leak."""
        positions = {} if batch.positions is None else {"position_ids": batch.positions}
        output = self.decoder(input_ids=batch.tokens, attention_mask=None, use_cache=False, **positions, **keywords)
        state: Tensor = output.last_hidden_state
        return state

    def forward(self, batch: RowBatch | Callable[[], Tensor], scale: float = 1.0, whole: bool | None = None) -> Tensor:
        """Return `scale` · summed negative log-likelihood of the batch, in nats, an fp32 scalar.

        For a function return its result: ZeRO-3 gathers the head's weights only in a forward pass of this module.

        `whole`: with the loss that the model itself adds, times the positions with loss, so that it is averaged over
        micro-batches as the rest is; by default in training mode only.
        """
        if callable(batch):
            return batch()
        if self._adds_loss and (self.training if whole is None else whole):
            hidden, added = states_and_added_loss(causal_model(self.model), self.decoder, batch)
            added = added * (scale * batch.num_targets)
            self._added = added.detach() if self._added is None else self._added + added.detach()
            return self._likelihood(hidden.flatten(0, 1), batch.loss_at, batch.targets, scale) + added
        return self._likelihood(*self._states(batch), batch.targets, scale)

    def _likelihood(self, hidden: Tensor, loss_at: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Return `scale` · summed negative log-likelihood from hidden states [N, D]."""
        weight = self.head_weight
        if weight is None:
            return cross_entropy_sum_through(self.head_function, hidden, loss_at, targets, self.vocabulary, scale)
        bias = getattr(self.head, "bias", None)
        return cross_entropy_sum(hidden, weight, loss_at, targets, scale, bias, scratch=self._scratch)

    @property
    def head_weight(self) -> Tensor | None:
        """The head's weight [V, D]; None if logits are more than a product with it."""
        through = self.through_module or self._own_head is not None
        return None if through else head_weight(self.head)

    @property
    def head_function(self) -> Callable[[Tensor], Tensor]:
        """States [rows, D] to logits [rows, V]."""
        return self.head if self._own_head is None else self._own_head

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return vocabulary_of(self.model)

    def _states(self, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states [N, D] and the indices of those with loss [M]."""
        num_targets, num_places = len(batch.targets), batch.tokens.numel()
        if self.positions_keyword is None or not 0 < num_targets < WORTH_TRIMMING * num_places:
            return self.hidden(batch).flatten(0, 1), batch.loss_at
        states = self.hidden(batch, **{self.positions_keyword: batch.loss_at}).flatten(0, 1)
        return states, torch.arange(num_targets, device=states.device)

    def computed(self, rows: ProofRows) -> Tensor:
        """Return the loss per position [1]."""
        batch = collate(rows.masked_rows).to(next(self.parameters()).device)
        loss: Tensor = self(batch, 1.0 / batch.num_targets, whole=True)
        self._added = None  # it is no part of training
        return loss[None]

    def expected(self, rows: ProofRows) -> Tensor:
        """Return transformers' own loss [1]."""
        device = next(self.parameters()).device
        labels = rows.labels.to(device)
        found = causal_model(self.model)(
            input_ids=rows.tokens.to(device), attention_mask=rows.mask.to(device), labels=labels, use_cache=False
        )
        tokens = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if not torch.is_grad_enabled():  # where gradients are wanted, this has been settled
            self._require_loss(rows, float(found.loss), float(tokens))
        loss: Tensor = found.loss
        return loss.float()[None]

    def _require_loss(self, rows: ProofRows, whole: float, tokens: float) -> None:
        """Note whether the model's own loss `whole` is more than that of the tokens' logits.

        Raises UserError if the difference is not a loss that the model adds whatever the labels are.
        """
        self._adds_loss = abs(whole - tokens) > ROUNDING * tokens
        if not self._adds_loss:
            return
        batch = collate(rows.masked_rows).to(next(self.parameters()).device)
        try:
            added = float(self(lambda: states_and_added_loss(causal_model(self.model), self.decoder, batch)[1]))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            added = 0.0
        if abs(whole - tokens - added) > ADDED_ROUNDING * abs(added):
            raise UserError(
                f"{type(causal_model(self.model)).__name__} cannot be trained: its own loss is {whole:.6f} on a batch "
                f"on which that of the next tokens is {tokens:.6f} and it adds {added:.6f}; use a model family listed "
                "in docs/models.md"
            )

    def head_difference(self, states: Tensor) -> float:
        def both() -> Tensor:
            with autocast_to(states.dtype, states.device):
                weight, bias = self.head_weight, getattr(self.head, "bias", None)
                # The call that a plain head makes, in the same shape, so that equal products are equal bit for bit.
                plain = self.head(states[None]) if weight is None else nn.functional.linear(states[None], weight, bias)
            return torch.stack([plain[0], OwnHead(causal_model(self.model), self.decoder)(states)]).float()

        plain, own = self(both)
        return float((plain - own).abs().mean() / plain.abs().mean().clamp(min=1e-6))

    def use_own_head(self, own: bool) -> None:
        self._own_head = OwnHead(causal_model(self.model), self.decoder) if own else None

    def take_added(self) -> float | None:
        added, self._added = self._added, None
        if not self._adds_loss:
            return None
        return 0.0 if added is None else float(added)


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


def decoder_in(causal: Any) -> nn.Module:
    """Return the part of a transformers model below its head. Raises UserError if there is none."""
    prefix = getattr(causal, "base_model_prefix", "") or "model"
    candidates = (getattr(causal, prefix, None), getattr(causal, "model", None))
    decoder = next((item for item in candidates if item is not None), None)
    if not isinstance(decoder, nn.Module):
        raise UserError(f"{type(causal).__name__} is not a decoder with a head, as LLaMA is; it cannot be trained")
    return decoder


def _head(causal: Any) -> nn.Module:
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UserError(
            f"{type(causal).__name__} has no language-model head, so it predicts no tokens; use a causal language model"
        )
    return head


def vocabulary_of(model: nn.Module) -> int:
    """Return the number of tokens that a model reads; its configuration may be nested in that of a larger model."""
    return int(causal_model(model).config.get_text_config(decoder=True).vocab_size)


def set_rope_theta(model: nn.Module, theta: float) -> bool:
    """Set the base of the rotary embedding, effective from the next forward pass; return False if it is set already.

    The configuration is changed too, so that a saved model keeps the base.
    """
    causal = causal_model(model)
    rope = causal.config.rope_parameters
    if rope.get("rope_theta") == theta:
        return False
    rope["rope_theta"] = theta
    rotary: Any = decoder_in(causal).rotary_emb
    fresh = type(rotary)(config=causal.config)
    with torch.no_grad():
        rotary.inv_freq.copy_(fresh.inv_freq)
        rotary.original_inv_freq = rotary.inv_freq.clone()  # dynamic scaling returns to these
    rotary.attention_scaling = fresh.attention_scaling
    return True
