"""The training state as one value: weights, moments, counters, data cursor, measurements, random-number states."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stagecoach_trainer.engine.engine import EngineState
from stagecoach_trainer.runtime.context import World


@dataclass
class Progression:
    """Counters and measurements of training. `step` is the data cursor as well: a step's rows are a function of it."""

    step: int = 0
    """Optimiser steps made, and the index of the next one."""
    tokens: int = 0
    """Tokens that entered the model."""
    loss: float = float("nan")
    """Loss of the last step, in nats per token."""
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step."""
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    """Early stopping: lowest loss so far."""
    without_improvement: int = 0
    """Early stopping: measurements since the lowest loss."""
    stopped_early: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional state of another training loop (PPO)."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self)) | {"loss": None if math.isnan(self.loss) else self.loss}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progression:
        known = dict(value)
        if known["loss"] is None:
            known["loss"] = float("nan")
        return cls(**known)


@dataclass(frozen=True)
class TrainingState:
    """The content of a checkpoint."""

    progression: Progression
    engine: EngineState
    random_states: tuple[Mapping[str, Tensor], ...]
    """Of every rank when saving; of this rank alone, or empty, when read."""

    @property
    def step(self) -> int:
        return self.progression.step


# -- random numbers ----------------------------------------------------------------------------------------------------


def seed_everything(seed: int, rank: int) -> None:
    """Seed all generators, differently on each rank, so that dropout differs."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # libraries use the global generator
    torch.manual_seed(mixed)


def random_state() -> dict[str, Tensor]:
    """Return the state of this rank's generators as tensors."""
    _, words, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)
    keys = [*legacy["state"]["key"].tolist(), legacy["state"]["pos"]]
    gauss_states = [gauss is not None, gauss or 0.0, legacy["has_gauss"], legacy["gauss"]]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor(keys, dtype=torch.int64),
        "gauss": torch.tensor(gauss_states, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore this rank's generators to a state that `random_state` returned."""
    has_gauss, gauss, numpy_has_gauss, numpy_gauss = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    *keys, position = state["numpy"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(keys, dtype=np.uint32), "pos": position},
            "has_gauss": int(numpy_has_gauss),
            "gauss": numpy_gauss,
        }
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gather_random_states(world: World) -> tuple[dict[str, Tensor], ...]:
    """Return every rank's state on every rank. States are sent as tensors, so nothing is pickled."""
    mine = random_state()
    if world.size == 1:
        return (mine,)
    gathered: list[dict[str, Tensor]] = [{} for _ in range(world.size)]
    for key, tensor in mine.items():
        parts = [torch.empty_like(tensor) for _ in range(world.size)]
        dist.all_gather(parts, tensor)
        for state, part in zip(gathered, parts, strict=True):
            state[key] = part
    return tuple(gathered)
