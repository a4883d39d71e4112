"""Learning rates and rotary bases: pure functions of the step. Steps count from 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from stagecoach_api.training import Schedule, ScheduleName, Training


@dataclass(frozen=True)
class PhaseSchedule:
    """The part of a stage's schedule that one phase of training sets."""

    first_step: int
    num_steps: int
    peak_rate: float | None
    """Peak of a learning-rate schedule over this phase alone; None if the stage's schedule continues."""
    rope_theta: float | None
    """Base of the rotary embedding; None for the model's own."""


@dataclass(frozen=True)
class StepSchedule:
    """The learning rate and the base of the rotary embedding of each optimiser step of a stage."""

    schedule: Schedule
    peak_rate: float
    num_steps: int
    """Optimiser steps of the whole stage."""
    phases: tuple[PhaseSchedule, ...] = ()
    """In order of their first steps; empty for a stage without phases."""

    @classmethod
    def of(cls, config: Training, num_steps: int, phases: Sequence[PhaseSchedule] = ()) -> Self:
        """Return the schedule that a stage's configuration sets for `num_steps` steps."""
        return cls(config.schedule, config.optimizer.learning_rate, num_steps, tuple(phases))

    def learning_rate(self, step: int) -> float:
        phase = self._phase(step)
        if phase is None or phase.peak_rate is None:
            return learning_rate(self.schedule, self.peak_rate, step, self.num_steps)
        return learning_rate(self.schedule, phase.peak_rate, step - phase.first_step, phase.num_steps)

    def rope_theta(self, step: int) -> float | None:
        phase = self._phase(step)
        return None if phase is None else phase.rope_theta

    def _phase(self, step: int) -> PhaseSchedule | None:
        return next((phase for phase in reversed(self.phases) if phase.first_step <= step), None)


def warmup_steps(schedule: Schedule, num_steps: int) -> int:
    """Return the number of warm-up steps of a schedule over `num_steps` steps."""
    if schedule.warmup_steps is not None:
        return min(schedule.warmup_steps, num_steps)
    return min(round(schedule.warmup_share * num_steps), num_steps)


def learning_rate(schedule: Schedule, highest: float, step: int, num_steps: int) -> float:
    """Return the learning rate of step `step` of `num_steps`.

    The warm-up of W steps rises linearly so that step W is the first at `highest`; no step has rate 0. Then the rate
    falls so that it would reach the floor at step `num_steps`, the one after the last.
    """
    warmup = warmup_steps(schedule, num_steps)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    return highest * (schedule.floor + (1.0 - schedule.floor) * _height(schedule, step, warmup, num_steps))


def _height(schedule: Schedule, step: int, warmup: int, num_steps: int) -> float:
    """Return the rate of a step after the warm-up as a share of the range above the floor, from 1 down to 0."""
    if schedule.name is ScheduleName.CONSTANT:
        return 1.0
    start = warmup
    if schedule.name is ScheduleName.WSD:
        start = max(warmup, num_steps - round(schedule.decay_share * num_steps))
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, num_steps - start))
    if schedule.name is ScheduleName.COSINE:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress
