"""Shared memory for equal frozen weights: policy, critic and reward models over the same base store it once.

Models need not declare a common base: frozen parameters of the same layer with equal content are made to share memory.
This is safe because nothing writes to frozen weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from stagecoach_trainer.kernels.causal import causal_model

WRAPPERS = frozenset({"base_layer", "original_module"})
"""Parts of a parameter's name that PEFT inserts between a layer and the module it wraps."""


def share_frozen(models: Iterable[nn.Module]) -> int:
    """Let frozen parameters of equal layer, shape, dtype, device and content share memory; return the bytes freed, as
    far as no other reference holds them.

    `models`: on their devices and in their compute formats; duplicates are allowed. Trained parameters and those that
    ZeRO-3 has sharded are skipped.
    """
    owners: dict[str, list[nn.Parameter]] = {}
    freed = 0
    for model in models:
        causal: Any = causal_model(model)
        for name, parameter in causal.named_parameters():
            if parameter.requires_grad or hasattr(parameter, "ds_id"):
                continue
            # Several owners per name: different reward models may differ in some layers.
            known = owners.setdefault(unwrapped_name(name, causal.base_model_prefix), [])
            twin = next((other for other in known if _same_content(other, parameter)), None)
            if twin is None:
                known.append(parameter)
            elif twin.data_ptr() != parameter.data_ptr():
                freed += parameter.numel() * parameter.element_size()
                parameter.data = twin.data
    return freed


def unwrapped_name(name: str, prefix: str) -> str:
    """Return a parameter's name within the body of the network, without PEFT's wrappers.

    A language model and a reward model over the same body then agree on the names.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[0] == prefix else parts)


def _same_content(one: nn.Parameter, other: nn.Parameter) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one.data, other.data)
