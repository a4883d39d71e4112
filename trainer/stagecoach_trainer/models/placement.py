"""Where a model computes while it is measured: the machine's first GPU if it has one, in a number format of its own."""

from __future__ import annotations

from typing import Any

import torch

from stagecoach_api.training import Precision

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


def compute_device() -> torch.device:
    """Return the device of this process; measuring is done by one rank."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def place(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Move a model to `device` with its parameters in `dtype`, ready to measure; returns it.

    Buffers keep their format: rotary frequencies in bf16 would turn far positions by wrong angles.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(device, dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval()
