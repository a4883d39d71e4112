"""What the training loop is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stagecoach_api.training import MeasuredTraining
from stagecoach_trainer.train.rows import Row, StepPlan

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class HeldOutSet:
    """Rows to measure on, with the name their figures get."""

    name: str
    rows: Sequence[Row]
    characters: int
    """Characters of the text the labels stand for: the divisor of bits per character."""


@dataclass(frozen=True)
class TrainingJob:
    """One training stage, ready to start."""

    model: nn.Module
    """A causal language model (or a PEFT model around one) on the CPU, weights in fp32, `requires_grad` set to what is
    trained, vocabulary already resized. `train` moves and casts it."""

    config: MeasuredTraining
    steps: StepPlan
    held_out: tuple[HeldOutSet, ...] = ()


@dataclass(frozen=True)
class TrainingResult:
    """What training came to. Equal runs give equal values, interrupted or not."""

    tokens: int
    """Training tokens that entered the model, padding apart."""

    steps: int
    """Optimiser steps made; fewer than planned after an early stop."""

    metrics: Mapping[str, float]
    """`loss` of the last step, `heldOut.<name>.before.{loss,bitsPerCharacter,perplexity}` and
    `heldOut.<name>.{loss,bitsPerCharacter,perplexity}`. `loss` is in nats per token."""

    history: Sequence[Mapping[str, float]] = field(default_factory=tuple)
    """At most some 200 points of `step`, `tokens`, `loss`, `learningRate`, `gradNorm`."""
