"""The one place that decides which faster implementations a model computes with.

Each entry of `FAST_PATHS` replaces one part of a model for the duration of a stage and leaves the model as it was.
Results agree with the replaced part to rounding. All of them are for CPUs: on a GPU the implementations of PyTorch and
transformers are used unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch

from stagecoach_trainer.kernels.attention import short_attention, uses_replaced_attention
from stagecoach_trainer.kernels.causal import DecoderLoss
from stagecoach_trainer.kernels.fast_llama import (
    fused_norms,
    in_place_rotation,
    is_llama,
    last_layer_can_be_trimmed,
    trimmed_last_layer,
)


@dataclass(frozen=True)
class FastPath:
    """A faster implementation of one part of a model."""

    applies: Callable[[DecoderLoss], bool]
    install: Callable[[DecoderLoss, torch.dtype], AbstractContextManager[None]]
    """Takes the loss module and the dtype it computes in; the part is replaced while the context lasts."""


FAST_PATHS = (
    # Attention over rows of a few hundred tokens. It comes first: trimming asks which attention is in use. It also lets
    # `unpadded.states_at` compute answers of different lengths without padding.
    FastPath(uses_replaced_attention, lambda loss, dtype: short_attention(loss.model)),
    FastPath(is_llama, lambda loss, dtype: in_place_rotation()),
    FastPath(is_llama, fused_norms),
    # The last layer's feed-forward part and the final norm, at positions with loss only.
    FastPath(last_layer_can_be_trimmed, lambda loss, dtype: trimmed_last_layer(loss)),
)


@contextmanager
def accelerate(loss: DecoderLoss, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Use every fast path that applies to a loss module on `device` that computes in `dtype`, within the block."""
    with ExitStack() as installed:
        if device.type == "cpu":
            for path in FAST_PATHS:
                if path.applies(loss):
                    installed.enter_context(path.install(loss, dtype))
        yield
