"""Dropout: that of attention as a stage sets it, and none at all where a model must say in training what it says when
it is asked."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from stagecoach_trainer.runtime.errors import UserError

WORDS = ("dropout", "pdrop")
"""Parts of the names that transformers gives to dropout probabilities."""
IN_ATTENTION = ("attention_dropout", "attn_dropout")
"""Names that it gives to that of the attention weights: a probability (LLaMA) or a layer (BLOOM, GPT-2)."""


def set_attention_dropout(model: nn.Module, probability: float) -> None:
    """Set the dropout probability of the attention weights. Raises UserError where a model has none and is to."""
    places = [
        (module, name) for module in model.modules() for name in IN_ATTENTION if getattr(module, name, None) is not None
    ]
    if probability > 0.0 and not places:
        raise UserError(f"attentionDropout: {type(model).__name__} has none that can be set; leave it out")
    for module, name in places:
        held = getattr(module, name)
        holder, attribute = (held, "p") if isinstance(held, nn.Dropout) else (module, name)
        setattr(holder, attribute, probability)


def switch_off_dropout(model: nn.Module) -> dict[str, float]:
    """Set every dropout probability of a model to 0: of its layers, and in its configuration.

    Returns those of the configuration that were not 0, or else those of the layers, by name.
    """
    told = _set_to_zero(getattr(model, "config", None), "")
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        found |= _set_to_zero(module, name)
    return told or found


def _set_to_zero(holder: Any, where: str) -> dict[str, float]:
    if isinstance(holder, _DropoutNd):
        found = {where: holder.p} if holder.p > 0.0 else {}
        holder.p = 0.0
        return found
    held = dict(vars(holder)) if holder is not None else {}
    found = {
        name: value
        for name, value in held.items()
        if isinstance(value, float) and value > 0.0 and any(word in name for word in WORDS)
    }
    for name in found:
        setattr(holder, name, 0.0)
    return found
