"""Input and result of the training loop."""

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
    """Held-out data that is measured before, during and after training."""

    @property
    def name(self) -> str:
        """Prefix of its metrics."""

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return metrics, the same on every rank, one of them `loss`.

        `module`: the objective's module. `report(done, total)` is called after each micro-batch.
        """


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out rows of text."""

    name: str
    rows: Sequence[Row]
    characters: int
    """Characters of the text that the labels encode: the divisor of bits per character."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of the encoding, those of samples left out among them."""

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return `loss` in nats per token, `bitsPerCharacter` and, unless it overflows, `perplexity`."""
        from stagecoach_trainer.loop.measure import measure_with

        found = measure_with(module, self.rows, micro_batch_rows, device, world, report)
        figures = {"loss": found.loss, "bitsPerCharacter": found.bits_per_character(self.characters)}
        if math.isfinite(found.perplexity):  # JSON, in which the manifest is written, has no infinity
            figures["perplexity"] = found.perplexity
        return figures


@dataclass(frozen=True)
class TrainingJob:
    """One training stage, ready to start."""

    model: nn.Module
    """A causal language model (or a PEFT model around one) on the CPU: weights in fp32, `requires_grad` set on what is
    trained, vocabulary resized. `train` moves and casts it."""

    config: MeasuredTraining
    steps: StepPlan
    held_out: Sequence[Measurable] = ()
    objective: Objective | None = None
    """None for next-token prediction."""

    at_end: Sequence[Measurable] = ()
    """Measured after the last step only; the metrics are called `<name>.<metric>`."""

    schedule: StepSchedule | None = None
    """Learning rate and rotary base of each step; None for the configuration's schedule over all steps."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of training. Equal runs give equal values, interrupted or not."""

    tokens: int
    """Training tokens that entered the model, without padding."""

    steps: int
    """Optimiser steps made; fewer than planned after an early stop."""

    metrics: Mapping[str, float]
    """`loss` of the last step, `heldOut.<name>.before.<figure>` and `heldOut.<name>.<figure>`. `loss` is per target:
    for text, in nats per token."""

    history: Sequence[Mapping[str, float]] = field(default_factory=tuple)
    """At most about 200 points of `step`, `tokens`, `loss`, `learningRate`, `gradNorm`."""
