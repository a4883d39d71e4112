"""The proof that a loss module computes what transformers' own forward pass of the model computes.

It is made on a few rows of the stage's data before the first step, with the same module, adapters and number formats as
training. Nothing is assumed from a model's name: scaled or capped logits, heads that transform, losses of routers and
attention that a fast path does not fit all show as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.kernels.causal import DecoderLoss, causal_model, vocabulary_of
from stagecoach_trainer.kernels.gradient_proof import Gradients, gradients_of, has_gradients, largest_difference
from stagecoach_trainer.kernels.own_head import autocast_to
from stagecoach_trainer.kernels.proof_rows import ProofRows
from stagecoach_trainer.runtime.collectives import max_over_ranks
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError

DIFFERENCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}
"""Largest difference of a figure, relative to the largest figure but at least 1, that is attributed to rounding.
Measured on the 140 architectures of transformers that predict next tokens: 3e-7 in fp32; in bf16 2e-3 with fast paths
and 3e-4 without; with them 1e-2 where rounding sends a token to another expert, which then computes without them. On a
GPU (one H200), which has no fast paths: 2e-7 and 2e-4. fp16 was not measured on all: its limit is in between."""

HEAD_DIFFERENCES = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-5}
"""Largest relative difference of two results of the same product. Measured: 0 on a CPU; 4e-3 of Gemma 2 in bf16, whose
soft cap changes logits near 0 by little more than a bit."""

NUM_LOGITS = 16
"""Positions at which logits are compared."""

GRADIENT_DIFFERENCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference of a gradient, relative to its norm, that is attributed to rounding. Measured with fast paths on
140 architectures: 2e-5 in fp32; in bf16 0.05 for LLaMA, Mistral and Qwen, 0.2 for Gemma 4 with large weights, and more
where rounding sends a token to another expert, which then computes without them."""

MOVEMENTS = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
"""Largest relative change of a hidden state by tokens that it must not see that is attributed to rounding.
Measured: exactly 0 in all dtypes wherever attention is causal, above 0.1 where it is not."""


@dataclass(frozen=True)
class Computed:
    """The outcome of computing a few rows."""

    values: Tensor
    """The figures in fp64 on the CPU [K]; NaN if they could not be computed."""

    moved: float
    """Largest relative change of an earlier state by a changed later token; 0 if states are not at hand."""

    states: Tensor | None = None
    """The first row's hidden states [T, D], if they are at hand."""

    error: Exception | None = None


class LossProof:
    """What transformers computes for a few rows, and the comparison of a loss module with it."""

    def __init__(
        self, loss: DecoderLoss, samples: Sequence[Ids], device: torch.device, dtype: torch.dtype, world: World
    ) -> None:
        """Compute the rows by transformers' own forward pass. All ranks make the same proof of the same rows.

        Raises UserError if that is impossible, or if the model is not causal.
        """
        self._loss = loss
        self._rows = ProofRows.of(samples, vocabulary_of(loss.model))
        self._dtype = dtype
        self._world = world
        self._name = type(causal_model(loss.model)).__name__
        with autocast_to(dtype, device), _without_autocast(loss.decoder):
            self._expected = self._compute(loss.expected)
        self._got = self._expected
        self._expected_gradients: Gradients = {}
        self._gradient_difference = (0.0, "")
        self._device = device
        self._require_language_model()

    def _require_language_model(self) -> None:
        found = self._expected
        if found.error is not None:
            raise UserError(
                f"{self._name}: transformers' own forward pass fails on a batch of token ids alone "
                f"({type(found.error).__name__}: {found.error}); {REMEDY}"
            ) from found.error
        if self._worst(found.moved) > MOVEMENTS[self._dtype]:
            raise UserError(
                f"{self._name} is not causal, so it does not predict next tokens: changing later tokens moved the "
                f"states of earlier ones by {found.moved:.2g} (allowed {MOVEMENTS[self._dtype]:.0e}); {REMEDY}"
            )

    def holds(self) -> bool:
        """Compute the rows by the module as it is now; return whether it computes what transformers does."""
        self._got, self._gradient_difference = self._compute(self._loss.computed), (0.0, "")
        fits = self._worst(self.difference) <= DIFFERENCES[self._dtype]  # NaN does not fit
        return fits and self._worst(self._got.moved) <= MOVEMENTS[self._dtype]

    def expect_gradients(self) -> None:
        """Compute the gradients of transformers' own loss, which `gradients_hold` then compares."""
        if has_gradients(self._loss):
            with autocast_to(self._dtype, self._device), _without_autocast(self._loss.decoder):
                self._expected_gradients = self._gradients(self._loss.expected)

    def gradients_hold(self) -> bool:
        """Compute gradients by the module as it is now; return whether they are those of transformers."""
        expected = self._expected_gradients
        if expected and all(bool(item.isfinite().all()) for item in expected.values()):
            self._gradient_difference = largest_difference(expected, self._gradients(self._loss.computed))
        return self._worst(self._gradient_difference[0]) <= GRADIENT_DIFFERENCES[self._dtype]

    def _gradients(self, compute: Callable[[ProofRows], Tensor]) -> Gradients:
        with _evaluated(self._loss):
            try:
                return gradients_of(self._loss, compute, self._rows.short)
            except (UserError, torch.OutOfMemoryError):
                raise
            except Exception:  # as in the forward pass
                return {}

    def has_plain_head(self) -> bool:
        """Return whether the model's own logits are those of its head alone, which their difference shows exactly even
        in bf16, where rounding would hide small ones in a loss."""
        states = self._expected.states
        if states is None:
            return True
        try:
            with _evaluated(self._loss), torch.no_grad():
                difference = self._loss.head_difference(states[:NUM_LOGITS].to(self._device, self._dtype))
        except (RuntimeError, TypeError, ValueError):
            return True  # the model's own code needs its decoder; the comparison of losses decides
        if math.isnan(difference):
            return True  # damaged weights, which the loss of the first step shows
        return self._worst(difference) <= HEAD_DIFFERENCES[self._dtype]

    @property
    def difference(self) -> float:
        """Largest difference of the figures, relative to the largest figure but at least 1."""
        expected, got = self._expected.values, self._got.values
        if expected.shape != got.shape:
            return math.nan
        return float(_differences(expected, got).max() / expected.abs().nan_to_num().max().clamp(min=1.0))

    @property
    def finding(self) -> str:
        """What the module computes differently, for a message; it names both figures."""
        expected, got = self._expected.values, self._got.values
        difference, name = self._gradient_difference
        if difference > GRADIENT_DIFFERENCES[self._dtype]:
            return f"the gradient of {name} differs by {difference:.2g} of its norm from that of transformers"
        if self._got.error is not None:
            return f"the loss cannot be computed ({type(self._got.error).__name__}: {self._got.error})"
        if expected.shape != got.shape:
            return f"there are {len(got)} figures instead of {len(expected)}"
        worst = int(_differences(expected, got).argmax())
        return (
            f"the loss is {float(got[worst]):.6f} where transformers computes {float(expected[worst]):.6f} (allowed "
            f"difference {DIFFERENCES[self._dtype]:.0e}), and later tokens move earlier states by {self._got.moved:.2g}"
        )

    def refuse(self) -> UserError:
        """Return the error for a module that does not compute what transformers does."""
        return UserError(f"{self._name} cannot be trained: on a batch of this stage, {self.finding}; {REMEDY}")

    def _worst(self, value: float) -> float:
        """Return the largest value of all ranks, so that they decide the same; NaN as infinity."""
        return max_over_ranks([math.inf if math.isnan(value) else value], self._world)[0]

    def _compute(self, compute: Callable[[ProofRows], Tensor]) -> Computed:
        states: list[Tensor] = []
        try:
            with _evaluated(self._loss), torch.no_grad(), _collected(self._loss, states):
                values = compute(self._rows).detach().double().cpu()
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model may fail in any way on input that it does not expect
            return Computed(torch.full((1,), math.nan, dtype=torch.float64), 0.0, error=error)
        each = [row for item in states for row in item]
        return Computed(values, _moved(each, self._rows), each[0] if each else None)


REMEDY = "use a model family listed in docs/models.md"


def _moved(states: Sequence[Tensor], rows: ProofRows) -> float:
    """Return the largest relative difference of the first two rows' states [T, D] where their tokens are equal."""
    if len(states) < len(rows.rows):
        return 0.0
    one, other = (row[: rows.num_equal].float() for row in states[:2])
    return float(_differences(one, other).max() / one.abs().nan_to_num().max().clamp(min=1e-6))


def _differences(one: Tensor, other: Tensor) -> Tensor:
    """Return absolute differences; where both are NaN, or the same infinity, 0: damaged weights are no wrong loss."""
    same = (one == other) | (one.isnan() & other.isnan())
    return (one - other).abs().masked_fill(same, 0.0)


@contextmanager
def _evaluated(loss: DecoderLoss) -> Iterator[None]:
    """Switch dropout off."""
    was_training = loss.training
    loss.eval()
    try:
        yield
    finally:
        loss.train(was_training)


@contextmanager
def _without_autocast(decoder: Any) -> Iterator[None]:
    """Let a decoder choose its number formats itself, as in training: autocast is for the head alone."""
    before = vars(decoder).get("forward")  # an instance attribute, which hides the class's method
    whole = decoder.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        device = next(decoder.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return whole(*arguments, **keywords)

    decoder.forward = forward
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


@contextmanager
def _collected(loss: DecoderLoss, states: list[Tensor]) -> Iterator[None]:
    """Append the hidden states [B, T, D] that the decoder returns."""

    def note(module: torch.nn.Module, inputs: object, output: object) -> None:
        del module, inputs
        found = getattr(output, "last_hidden_state", None)
        if isinstance(found, Tensor):
            states.append(found)

    hook = loss.decoder.register_forward_hook(note)
    try:
        yield
    finally:
        hook.remove()
