"""Learning rates: pure functions of the step. Steps count from 0."""

from __future__ import annotations

import math

from stagecoach_api.training import Schedule, ScheduleName


def warmup_steps(schedule: Schedule, num_steps: int) -> int:
    """Return the number of warm-up steps of a schedule over `num_steps` steps."""
    if schedule.warmup_steps is not None:
        return min(schedule.warmup_steps, num_steps)
    return min(round(schedule.warmup_share * num_steps), num_steps)


def learning_rate(schedule: Schedule, highest: float, step: int, num_steps: int) -> float:
    """Return the learning rate of step `step` of `num_steps`.

    The warm-up of W steps rises in a straight line so that step W is the first at `highest`; no step is made at 0.
    After it the rate falls so that it would reach the floor at step `num_steps`, just behind the last.
    """
    warmup = warmup_steps(schedule, num_steps)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    return highest * (schedule.floor + (1.0 - schedule.floor) * _height(schedule, step, warmup, num_steps))


def _height(schedule: Schedule, step: int, warmup: int, num_steps: int) -> float:
    """Return the height above the floor, from 1 down to 0, of a step after the warm-up."""
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
