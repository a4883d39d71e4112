"""What both sides train: the model, the rows, and the same numbers in either side's form."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stagecoach_trainer.batches.rows import IGNORE, Row, Unit
from stagecoach_trainer.batches.schedule import StepSchedule

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCABULARY, WIDTH, LAYERS, HEADS = 8192, 256, 4, 4
ROWS, TOKENS = 8, 256
"""A batch of the throughput figures: 8 rows of 256 tokens."""
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Sample:
    """One sample: its tokens [T], and how many of them at the start are a prompt, which carries no loss."""

    tokens: npt.NDArray[np.int32]
    prompt: int = 0


Batch = Sequence[Sample]
"""The samples of one optimiser step."""


@dataclass(frozen=True)
class Run:
    """One training run of either side."""

    step_seconds: Sequence[float]
    """Seconds from one optimiser step to the next; the first step, which warms up, has none."""
    losses: Sequence[float]
    """Loss of every step, in nats per token."""


def make_model(seed: int = 0, max_positions: int = 1024) -> LlamaForCausalLM:
    """Return a LLaMA of 7.4M parameters in fp32; equal seeds give equal weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def full_rows(steps: int, masked_share: float, seed: int = 0) -> list[Batch]:
    """Return batches of ROWS samples of TOKENS tokens each, the first `masked_share` of every sample a prompt."""
    random = np.random.default_rng(seed)
    prompt = int(TOKENS * masked_share)
    return [[Sample(_tokens(random, TOKENS), prompt) for _ in range(ROWS)] for _ in range(steps)]


def belle_like(steps: int, samples: int, longest: int, seed: int = 0) -> list[Batch]:
    """Return batches of samples with BELLE-like lengths: lognormal, 23 % of `longest` on average, cut there.

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
    """Return ids with a law like language's (Zipf), so that the loss falls."""
    return np.asarray(np.minimum(random.zipf(1.2, number), VOCABULARY - 1), dtype=np.int32)


def useful_tokens(batch: Batch) -> int:
    return sum(len(sample.tokens) for sample in batch)


def labels_of(sample: Sample) -> npt.NDArray[np.int32]:
    """Return targets [T], already shifted: the token that follows, or IGNORE within the prompt and at the end."""
    labels = np.full(len(sample.tokens), IGNORE, dtype=np.int32)
    labels[:-1] = sample.tokens[1:]
    labels[: max(0, sample.prompt - 1)] = IGNORE
    return labels


def row_of(sample: Sample) -> Row:
    """Return a row with one sample."""
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
