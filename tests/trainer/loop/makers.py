"""Makers for the tests of the training loop: a tiny LLaMA, a plan of random rows, a context over a folder store."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stagecoach_api.references import WeightedSource
from stagecoach_api.training import Batch, MeasuredTraining, Optimizer, Schedule, ScheduleName
from stagecoach_trainer.batches.rows import IGNORE, Row
from stagecoach_trainer.batches.schedule import StepSchedule
from stagecoach_trainer.runtime.checkpoint_paths import complete_checkpoints
from stagecoach_trainer.runtime.context import StageContext, World
from tests.trainer.contexts import resolved_stage, stage_context

VOCABULARY = 197
LINEAR = Schedule(name=ScheduleName.LINEAR)


def tiny_model(seed: int = 0, tie: bool = False, **settings: Any) -> LlamaForCausalLM:
    """A LLaMA with 2 layers of width 32, in fp32."""
    torch.manual_seed(seed)
    settings = {"num_key_value_heads": 2} | settings
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        initializer_range=0.1,
        **settings,
    )
    return LlamaForCausalLM(config)


def row(lengths: Sequence[int], seed: int, masked_share: float = 0.0) -> Row:
    """A row of random samples of these lengths; a share of the targets carries no loss."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, VOCABULARY, sum(lengths), dtype=np.int32)
    labels = np.roll(tokens, -1)
    labels[np.cumsum(lengths) - 1] = IGNORE
    labels[random.random(len(labels)) < masked_share] = IGNORE
    return Row(tokens, labels.astype(np.int32), tuple(lengths))


@dataclass(frozen=True)
class RandomPlan:
    """A step plan of random packed rows: a pure function of seed and step."""

    num_steps: int = 6
    num_rows: int = 4
    length: int = 24
    packed: bool = True
    packed_from: int = 0
    """The first step with packed rows."""
    masked_share: float = 0.3

    def rows(self, step: int) -> list[Row]:
        packed = self.packed and step >= self.packed_from
        lengths = (self.length // 3, self.length - self.length // 3) if packed else (self.length,)
        return [row(lengths, 1000 * step + index, self.masked_share) for index in range(self.num_rows)]


@dataclass(frozen=True)
class WatchedSchedule(StepSchedule):
    """The schedule of `training()`; calls `on_step(step)` as each step begins, in the training loop's thread."""

    schedule: Schedule = LINEAR
    peak_rate: float = 1e-2
    num_steps: int = 6
    on_step: Callable[[int], None] = lambda step: None

    def learning_rate(self, step: int) -> float:
        self.on_step(step)
        return super().learning_rate(step)


def training(micro_batch_rows: int = 2, **settings: Any) -> MeasuredTraining:
    """A training configuration in fp32."""
    values: dict[str, Any] = {
        "data": (WeightedSource(uri="unused.jsonl"),),
        "batch": Batch(samples=1, micro_batch_rows=micro_batch_rows),
        "optimizer": Optimizer(learning_rate=1e-2, weight_decay=0.1),
        "schedule": LINEAR,
        "precision": "fp32",
    }
    return MeasuredTraining(**(values | settings))


def complete_steps(home: Path) -> list[int]:
    """Return the steps whose checkpoint has a manifest, in ascending order."""
    return sorted({mark.step for mark in complete_checkpoints(home)})


def context(folder: Path, world: World | None = None, seed: int = 7) -> StageContext:
    """A context whose store, work and cache folders are in `folder`."""
    work, resolved = folder / "work", resolved_stage(folder / "store", stage="train", seed=seed)
    return stage_context(resolved, work, folder / "cache", world, progress=work / "progress.jsonl")


def run_until_killed(be_killed: Callable[[str], None], folder: Path, seconds: float) -> None:
    """Run `be_killed(folder)` in a fork of this process, which has imported everything. It must end by SIGKILL."""
    worker = multiprocessing.get_context("fork").Process(target=be_killed, args=(str(folder),))
    worker.start()
    worker.join(seconds)
    assert worker.exitcode == -signal.SIGKILL


@contextmanager
def disk_full_beyond(size: int) -> Iterator[None]:
    """Limit the size of files to `size` bytes; for a writer it is like a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether all parameters agree bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


__all__ = ["RandomPlan", "context", "equal_weights", "replace", "row", "tiny_model", "training", "weights"]
