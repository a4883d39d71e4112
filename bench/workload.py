"""The workload of both sides: the model and the rows, in the form that each side reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bench.llama import VOCABULARY, llama_config
from stagecoach_trainer.batches.rows import IGNORE, Row, Unit
from stagecoach_trainer.batches.schedule import StepSchedule

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROWS, TOKENS = 8, 256
"""A batch of the throughput bench: 8 rows of 256 tokens."""
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Sample:
    """A sample: its tokens [T], of which the first `prompt` carry no loss."""

    tokens: npt.NDArray[np.int32]
    prompt: int = 0


Batch = Sequence[Sample]
"""The samples of one optimiser step."""


@dataclass(frozen=True)
class Run:
    """A training run of either side."""

    step_seconds: Sequence[float]
    """Seconds from one optimiser step to the next, without the first step, which is a warm-up."""
    losses: Sequence[float]
    """Loss of every step, in nats per token."""


def make_model(seed: int = 0, max_positions: int = 1024) -> LlamaForCausalLM:
    """Return a LLaMA of 7.4M parameters in fp32; equal seeds give equal weights."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(max_positions, bos_token_id=1, eos_token_id=2, use_cache=False))


def full_rows(steps: int, masked_share: float, seed: int = 0) -> list[Batch]:
    """Return batches of ROWS samples of TOKENS tokens; the first `masked_share` of every sample is its prompt."""
    random = np.random.default_rng(seed)
    prompt = int(TOKENS * masked_share)
    return [[Sample(_tokens(random, TOKENS), prompt) for _ in range(ROWS)] for _ in range(steps)]


def belle_like(steps: int, samples: int, longest: int, seed: int = 0) -> list[Batch]:
    """Return batches with lengths distributed as BELLE's: lognormal, mean 23 % of `longest`, cut off at `longest`.

    A third of every sample is its prompt.
    """
    random = np.random.default_rng(seed)
    lengths = lognormal_lengths(random, steps * samples, longest)
    drawn = [Sample(_tokens(random, int(length)), int(length) // 3) for length in lengths]
    return [drawn[start : start + samples] for start in range(0, len(drawn), samples)]


def lognormal_lengths(random: np.random.Generator, number: int, longest: int) -> npt.NDArray[np.int64]:
    """Return `number` lengths: the median is an eighth of `longest`, sigma 1, at least 8."""
    return np.clip(random.lognormal(np.log(longest / 7.0), 1.0, number), 8, longest).astype(np.int64)


def _tokens(random: np.random.Generator, number: int) -> npt.NDArray[np.int32]:
    """Return token ids with Zipf's distribution, as in language, so that the loss falls."""
    return np.asarray(np.minimum(random.zipf(1.2, number), VOCABULARY - 1), dtype=np.int32)


def useful_tokens(batch: Batch) -> int:
    return sum(len(sample.tokens) for sample in batch)


def labels_of(sample: Sample) -> npt.NDArray[np.int32]:
    """Return targets [T], already shifted: the next token, or IGNORE within the prompt and at the end."""
    labels = np.full(len(sample.tokens), IGNORE, dtype=np.int32)
    labels[:-1] = sample.tokens[1:]
    labels[: max(0, sample.prompt - 1)] = IGNORE
    return labels


def row_of(sample: Sample) -> Row:
    """Return a row of one sample."""
    return Row(tokens=sample.tokens, labels=labels_of(sample), lengths=(len(sample.tokens),))


@dataclass
class GivenPlan:
    """The given rows, step by step."""

    batches: Sequence[Sequence[Unit]]

    @property
    def num_steps(self) -> int:
        return len(self.batches)

    def rows(self, step: int) -> Sequence[Unit]:
        return self.batches[step]


@dataclass(frozen=True)
class ClockedSchedule(StepSchedule):
    """A configuration's schedule; records when each step begins."""

    begun: dict[int, float] = field(default_factory=dict)

    def learning_rate(self, step: int) -> float:
        self.begun.setdefault(step, time.perf_counter())
        return super().learning_rate(step)
