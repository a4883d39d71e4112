"""The one place that decides how a model's loss is computed: which faster implementations are used, and which head.

Each entry of `FAST_PATHS` replaces one part of a model for the duration of a stage and leaves the model as it was. All
of them are for CPUs: on a GPU the implementations of PyTorch and transformers are used unchanged. What is used is
proved on the model itself (`proof`): a fast path that changes the result is left out, and a model whose logits are more
than a product with the head's weight computes them by its own code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch

from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.kernels.attention import short_attention, uses_replaced_attention
from stagecoach_trainer.kernels.causal import DecoderLoss, causal_model
from stagecoach_trainer.kernels.fast_llama import (
    fused_norms,
    in_place_rotation,
    is_llama,
    last_layer_can_be_trimmed,
    trimmed_last_layer,
)
from stagecoach_trainer.kernels.proof import LossProof
from stagecoach_trainer.runtime.context import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastPath:
    """A faster implementation of one part of a model."""

    name: str
    """What it replaces, for the log."""

    applies: Callable[[DecoderLoss], bool]
    install: Callable[[DecoderLoss, torch.dtype], AbstractContextManager[None]]
    """Takes the loss module and the dtype it computes in; the part is replaced while the context lasts."""


FAST_PATHS = (
    # Attention over rows of a few hundred tokens. It comes first: trimming asks which attention is in use. It also lets
    # `unpadded.states_at` compute answers of different lengths without padding.
    FastPath("attention", uses_replaced_attention, lambda loss, dtype: short_attention(loss.model)),
    FastPath("rotary embedding", is_llama, lambda loss, dtype: in_place_rotation()),
    FastPath("norms", is_llama, fused_norms),
    # The last layer's feed-forward part and the final norm, at positions with loss only.
    FastPath("last layer", last_layer_can_be_trimmed, lambda loss, dtype: trimmed_last_layer(loss)),
)


@contextmanager
def accelerate(
    loss: DecoderLoss,
    device: torch.device,
    dtype: torch.dtype,
    samples: Sequence[Ids] = (),
    world: World | None = None,
) -> Iterator[None]:
    """Compute the loss of a module on `device` in `dtype` correctly, and as fast as that allows, within the block.

    `samples`: ids of the stage's own samples, on which it is proved; without any, on ids of the vocabulary. All ranks
    of `world` must call this at the same time, with the same samples. Raises UserError if the module cannot compute
    what transformers' own forward pass computes.
    """
    proof = LossProof(loss, samples, device, dtype, world or World())
    paths = FAST_PATHS if device.type == "cpu" else ()
    with _used(loss, dtype, _proved(loss, dtype, proof, paths)):
        yield


def prove_head(
    loss: DecoderLoss,
    device: torch.device,
    dtype: torch.dtype,
    samples: Sequence[Ids] = (),
    world: World | None = None,
) -> None:
    """Prove a module without fast paths, as `accelerate` does, and let it use the model's own head if it must."""
    _settle_head(loss, LossProof(loss, samples, device, dtype, world or World()))


def _proved(loss: DecoderLoss, dtype: torch.dtype, proof: LossProof, paths: Sequence[FastPath]) -> Sequence[FastPath]:
    """Return the fast paths with which the module computes what transformers does; settle its head."""
    if any(path.applies(loss) for path in paths):
        proof.expect_gradients()
    if proof.has_plain_head() and _holds(loss, dtype, proof, paths):
        return paths
    _settle_head(loss, proof)
    if _holds(loss, dtype, proof, paths):
        return paths
    kept: list[FastPath] = []
    for path in paths:
        if not path.applies(loss):
            continue
        if _holds(loss, dtype, proof, [*kept, path]):
            kept.append(path)
        else:
            log.info(
                "%s keeps its own %s: with the faster one, %s",
                type(causal_model(loss.model)).__name__,
                path.name,
                proof.finding,
            )
    return kept


def _settle_head(loss: DecoderLoss, proof: LossProof) -> None:
    """Let the head alone compute logits if that is what the model does, else the model's own code.

    Raises UserError if the loss is that of transformers with neither.
    """
    if proof.has_plain_head():
        if not proof.holds():
            raise proof.refuse()
        return
    loss.use_own_head(True)
    if proof.holds():
        log.info(
            "%s: logits are more than a product with the head's weight, so the model's own code computes them",
            type(causal_model(loss.model)).__name__,
        )
        return
    loss.use_own_head(False)
    if not proof.holds():
        raise proof.refuse()


def _holds(loss: DecoderLoss, dtype: torch.dtype, proof: LossProof, paths: Sequence[FastPath]) -> bool:
    are_used = any(path.applies(loss) for path in paths)
    with _used(loss, dtype, paths):
        return proof.holds() and (not are_used or proof.gradients_hold())


@contextmanager
def _used(loss: DecoderLoss, dtype: torch.dtype, paths: Sequence[FastPath]) -> Iterator[None]:
    """Use every fast path that applies within the block."""
    with ExitStack() as installed:
        for path in paths:
            if path.applies(loss):
                installed.enter_context(path.install(loss, dtype))
        yield
