"""Sampling of a policy's answers: batched decoding with a key-value cache, one random number per token.

A row's tokens depend only on its own random numbers, not on the other rows: an answer is a function of the policy, the
seed, the update and its position in the update.

B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.generation.generation import pad_left

Uniforms = npt.NDArray[np.float64]

COMPACT_BELOW = 0.75
"""Share of unfinished rows below which finished ones are removed from the batch and the cache."""


@dataclass(frozen=True)
class Decoding:
    """Settings for drawing tokens."""

    max_new_tokens: int
    temperature: float
    top_p: float
    ends: tuple[int, ...]
    """Token ids that end an answer."""
    missing: tuple[int, ...] = ()
    """Ids that are never drawn, because the vocabulary has no token for them."""


@dataclass(frozen=True)
class Sampled:
    """One sampled answer."""

    ids: Ids
    """Token ids [A], including the end token, if any; never empty."""

    ended: bool
    """Whether the last token is an end token; otherwise the answer was truncated."""


def uniforms(key: Sequence[int], count: int) -> Uniforms:
    """Return the random numbers of one answer [count]: a pure function of `key`, whose parts must not be negative."""
    # A counter-based generator: streams of different keys are independent (Salmon et al., SC 2011).
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key)))).random(count)


class ModelCalls:
    """How the decoder calls the model: on this rank alone. Subclasses can make the calls collective."""

    def mode(self) -> AbstractContextManager[Any]:
        """Return the context in which answers are generated."""
        return torch.inference_mode()

    def should_continue(self, pending: bool) -> bool:
        """Return whether to make one more call; `pending`: whether this rank has unfinished rows."""
        return pending

    def logits(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of `compute`, which calls the model's modules."""
        return compute()


def sample_answers(
    model: Any,
    prompts: Sequence[Ids],
    draws: Sequence[Uniforms],
    decoding: Decoding,
    device: torch.device,
    calls: ModelCalls | None = None,
) -> list[Sampled]:
    """Return one answer per prompt, in order.

    Args:
        model: A transformers causal language model in evaluation mode.
        prompts: Token ids of the prompts.
        draws: Random numbers in [0, 1) for each answer, at least `max_new_tokens` each.
        decoding: Settings for drawing tokens.
        device: The model's device.
        calls: How the model is called; on this rank alone if None. Extra calls do not change finished rows.
    """
    calls = calls or ModelCalls()
    with calls.mode():
        batch = _Decoder(model, prompts, draws, decoding, device)
        while calls.should_continue(batch.pending):
            batch.advance(calls)
    return batch.answers()


class _Decoder:
    """The state of one batch while it is decoded."""

    def __init__(
        self, model: Any, prompts: Sequence[Ids], draws: Sequence[Uniforms], decoding: Decoding, device: torch.device
    ) -> None:
        from transformers import DynamicCache

        self._decoder = getattr(model, model.base_model_prefix)
        self._head = _OutputLayer(model.get_output_embeddings())
        self._decoding = decoding
        tokens, mask = pad_left(prompts, padding=0)
        self._input = tokens.to(device)
        self._mask = mask.to(device)
        # Positions count from each prompt's first token: padding on the left must not shift them.
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache: Any = DynamicCache()
        self._draws = torch.from_numpy(np.stack([row[: decoding.max_new_tokens] for row in draws])).to(device)
        self._ends = torch.tensor(decoding.ends, dtype=torch.int64, device=device)
        self._missing = torch.tensor(decoding.missing, dtype=torch.int64, device=device)
        self._rows = torch.arange(len(prompts), device=device)
        self._finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self._step = 0

    @property
    def pending(self) -> bool:
        return self._step < self._decoding.max_new_tokens and not bool(self._finished.all())

    def advance(self, calls: ModelCalls) -> None:
        """Draw the next token of every unfinished row."""
        # Finished rows still draw until they are removed: `_append` ignores their tokens.
        chosen = draw(calls.logits(self._logits), self._draws[self._rows, self._step], self._decoding)
        self._append(chosen)
        self._step += 1
        self._input = chosen[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(chosen), 1)], dim=-1)
        self._positions = self._positions[:, -1:] + 1
        self._compact()

    def _logits(self) -> Tensor:
        """Return the logits [B, V] of each row's next token."""
        output = self._decoder(
            input_ids=self._input,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = self._head(output.last_hidden_state[:, -1])
        return logits.index_fill(-1, self._missing, -torch.inf) if len(self._missing) else logits

    def _append(self, chosen: Tensor) -> None:
        ended = torch.isin(chosen, self._ends)
        live = (~self._finished).tolist()
        for row, token, is_end, is_live in zip(self._rows.tolist(), chosen.tolist(), ended.tolist(), live, strict=True):
            if is_live:
                self._tokens[row].append(token)
                self._ended[row] = is_end
        self._finished = self._finished | ended

    def _compact(self) -> None:
        """Remove finished rows, so that no more is computed for them."""
        live = torch.nonzero(~self._finished)[:, 0]
        # Not for every finished row: selecting copies the whole cache.
        if not 0 < len(live) < COMPACT_BELOW * len(self._finished):
            return
        self._cache.batch_select_indices(live)
        self._rows, self._finished = self._rows[live], self._finished[live]
        self._input, self._mask, self._positions = self._input[live], self._mask[live], self._positions[live]

    def answers(self) -> list[Sampled]:
        return [Sampled(np.array(ids, np.int32), ended) for ids, ended in zip(self._tokens, self._ended, strict=True)]


class _OutputLayer:
    """The output layer, computed in the number format of the states, as training does (`kernels/log_probs.py`).

    While training, the layer's weight may be in fp32 and the rest of the model in bf16.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._dtype = next(layer.parameters()).dtype
        self._weight: Tensor | None = None
        self._is_plain = type(layer) is nn.Linear and not hasattr(
            layer.weight, "ds_id"
        )  # ZeRO-3 gathers only in a call

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits [B, V] of states [B, D]."""
        if not self._is_plain or self._dtype is states.dtype:
            logits: Tensor = self._layer(states.to(self._dtype))
            return logits
        if self._weight is None:
            # Cast once per batch of answers: weights do not change meanwhile.
            self._weight = self._layer.weight.to(states.dtype)
        bias = self._layer.bias
        return nn.functional.linear(states, self._weight, None if bias is None else bias.to(states.dtype))


def draw(logits: Tensor, numbers: Tensor, decoding: Decoding) -> Tensor:
    """Return for each row the token [B] at which the cumulative probability of `logits` [B, V] exceeds the row's number
    [B], which is in [0, 1).

    With `top_p` only the most likely tokens that make up this share of the probability can be drawn (nucleus sampling,
    arXiv 1904.09751).
    """
    logits = logits.float()
    if decoding.temperature != 1.0:
        logits = logits / decoding.temperature
    p = torch.softmax(logits, dim=-1).double()
    if decoding.top_p < 1.0:
        p = _nucleus(p, decoding.top_p)
    mass = p.cumsum(-1)  # fp64: a sum over the whole vocabulary, of which tails matter
    total = mass[:, -1]
    # The product may round up to the total, which no token's cumulative probability exceeds.
    wanted = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, wanted[:, None], right=True)[:, 0]


def _nucleus(p: Tensor, share: float) -> Tensor:
    """Return `p` [B, V] with 0 for all but the most likely tokens that make up `share`."""
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(before >= share, 0.0))
