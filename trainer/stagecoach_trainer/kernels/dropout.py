"""Dropout: of attention weights as a stage sets it, and none where a model must give the same output in training and
in inference."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from stagecoach_trainer.runtime.errors import UserError

NAME_PARTS = ("dropout", "pdrop")
"""Substrings of the names that transformers gives to dropout probabilities."""
IN_ATTENTION = ("attention_dropout", "attn_dropout")
"""Names that transformers gives to dropout of attention weights: a probability (LLaMA) or a layer (BLOOM, GPT-2)."""


def set_attention_dropout(model: nn.Module, probability: float) -> None:
    """Set the dropout probability of the attention weights.

    Raises UserError for a positive probability if the model has no such dropout.
    """
    places = [
        (module, name) for module in model.modules() for name in IN_ATTENTION if getattr(module, name, None) is not None
    ]
    if probability > 0.0 and not places:
        raise UserError(f"attentionDropout: {type(model).__name__} has no attention dropout; remove the field")
    for module, name in places:
        held = getattr(module, name)
        holder, attribute = (held, "p") if isinstance(held, nn.Dropout) else (module, name)
        setattr(holder, attribute, probability)


def switch_off_dropout(model: nn.Module) -> dict[str, float]:
    """Set every dropout probability of a model to 0: of its layers, and in its configuration.

    Returns the probabilities of the configuration that were not 0, or else those of the layers, by name.
    """
    configured = _set_to_zero(getattr(model, "config", None), "")
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        found |= _set_to_zero(module, name)
    return configured or found


def _set_to_zero(holder: Any, where: str) -> dict[str, float]:
    if isinstance(holder, _DropoutNd):
        found = {where: holder.p} if holder.p > 0.0 else {}
        holder.p = 0.0
        return found
    held = dict(vars(holder)) if holder is not None else {}
    found = {
        name: value
        for name, value in held.items()
        if isinstance(value, float) and value > 0.0 and any(part in name for part in NAME_PARTS)
    }
    for name in found:
        setattr(holder, name, 0.0)
    return found
