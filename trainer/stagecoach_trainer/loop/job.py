"""What the training loop is given and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from stagecoach_api.training import MeasuredTraining
from stagecoach_trainer.batches.rows import Row, StepPlan
from stagecoach_trainer.batches.schedule import StepSchedule
from stagecoach_trainer.runtime.context import World

if TYPE_CHECKING:
    import torch
    from torch import nn

    from stagecoach_trainer.engine.objective import Objective

Report = Callable[[int, int], None]


class Measurable(Protocol):
    """Something to measure before, during and after training."""

    @property
    def name(self) -> str:
        """The name its figures get."""

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return figures, the same on every rank, one of them `loss`. `module` is the objective's; `report(done,
        total)` is called after each micro-batch."""


@dataclass(frozen=True)
class HeldOutSet:
    """Rows of text to measure on."""

    name: str
    rows: Sequence[Row]
    characters: int
    """Characters of the text the labels stand for: the divisor of bits per character."""

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return `loss` in nats per token, `bitsPerCharacter` and, where a float holds it, `perplexity`."""
        from stagecoach_trainer.loop.measure import measure_with

        found = measure_with(module, self.rows, micro_batch_rows, device, world, report)
        figures = {"loss": found.loss, "bitsPerCharacter": found.bits_per_character(self.characters)}
        if math.isfinite(found.perplexity):  # a manifest holds numbers that JSON has a word for
            figures["perplexity"] = found.perplexity
        return figures


@dataclass(frozen=True)
class TrainingJob:
    """One training stage, ready to start."""

    model: nn.Module
    """A causal language model (or a PEFT model around one) on the CPU, weights in fp32, `requires_grad` set to what is
    trained, vocabulary already resized. `train` moves and casts it."""

    config: MeasuredTraining
    steps: StepPlan
    held_out: Sequence[Measurable] = ()
    objective: Objective | None = None
    """What is minimised. None: next-token prediction."""

    at_end: Sequence[Measurable] = ()
    """What is measured after the last step only; its figures are called `<name>.<figure>`."""

    schedule: StepSchedule | None = None
    """Learning rate and rotary base of each step; None for the configuration's schedule over all steps."""


@dataclass(frozen=True)
class TrainingResult:
    """What training came to. Equal runs give equal values, interrupted or not."""

    tokens: int
    """Training tokens that entered the model, padding apart."""

    steps: int
    """Optimiser steps made; fewer than planned after an early stop."""

    metrics: Mapping[str, float]
    """`loss` of the last step, `heldOut.<name>.before.<figure>` and `heldOut.<name>.<figure>`. `loss` is per target:
    for text, in nats per token."""

    history: Sequence[Mapping[str, float]] = field(default_factory=tuple)
    """At most some 200 points of `step`, `tokens`, `loss`, `learningRate`, `gradNorm`."""
