"""One copy of what is frozen: policy, critic and reward models that are adapters over the same weights keep them once.

Sharing needs no agreement beforehand: whatever is frozen, stands at the same place of the network and has the same
content becomes the same memory. Nothing writes into frozen weights, so nobody notices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from stagecoach_trainer.kernels.causal import causal_model

WRAPPERS = frozenset({"base_layer", "original_module"})
"""Parts of a parameter's name that PEFT puts between a layer and what it wraps."""


def share_frozen(models: Iterable[nn.Module]) -> int:
    """Let frozen parameters of equal place, shape, format, device and content share their memory; return the bytes
    that this frees once nobody else holds them.

    `models`: on their devices and in their compute formats; twice the same one does no harm. Parameters that ZeRO-3 has
    sharded are left alone, as is every trained one.
    """
    kept: dict[str, list[nn.Parameter]] = {}
    freed = 0
    for model in models:
        causal: Any = causal_model(model)
        for name, parameter in causal.named_parameters():
            if parameter.requires_grad or hasattr(parameter, "ds_id"):
                continue
            known = kept.setdefault(place_of(name, causal.base_model_prefix), [])
            twin = next((other for other in known if equal(other, parameter)), None)
            if twin is None:
                known.append(parameter)
            elif twin.data_ptr() != parameter.data_ptr():
                freed += parameter.numel() * parameter.element_size()
                parameter.data = twin.data
    return freed


def place_of(name: str, prefix: str) -> str:
    """Return where a parameter stands in the network, whatever is wrapped around it or put on top: a language model and
    a reward model have the same body."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[0] == prefix else parts)


def equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    """Tell whether two parameters are the same in all but their memory."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one.data, other.data)


def memory_of(models: Iterable[nn.Module]) -> int:
    """Return the bytes that the parameters of `models` take, shared ones counted once."""
    storages = (parameter.data.untyped_storage() for model in models for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
