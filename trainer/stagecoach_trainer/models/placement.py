"""Device and number format of a model that is used for inference: the machine's first GPU if it has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compute_device() -> torch.device:
    """Return the device of this process; one rank does all measuring."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def place(model: Any, dtype: torch.dtype, device: torch.device, exact: nn.Module | None = None) -> Any:
    """Freeze a model, move it to `device` with its parameters in `dtype`, and return it in evaluation mode.

    `exact`: a part of the model whose parameters stay in fp32. Buffers keep their dtype: rotary frequencies in bf16
    would rotate distant positions by wrong angles.
    """
    kept_exact = set() if exact is None else {id(parameter) for parameter in exact.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(device, torch.float32 if id(parameter) in kept_exact else dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval()
