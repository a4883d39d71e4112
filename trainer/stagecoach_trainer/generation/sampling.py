"""Answers of a policy: batched decoding with a key-value cache, one random number per token.

Which token a row draws depends on its own random numbers alone, not on its neighbours: an answer is a function of the
policy, the seed, the update and its place in the update.

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
"""Share of rows still under way below which the finished ones are taken out of the cache."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float
    top_p: float
    ends: tuple[int, ...]
    """Ids that end an answer."""


@dataclass(frozen=True)
class Sampled:
    """One answer as it was drawn."""

    ids: Ids
    """Token ids [A], the end token included where there is one; never empty."""

    ended: bool
    """The last token is an end token; else the answer was cut."""


def uniforms(key: Sequence[int], count: int) -> Uniforms:
    """Return the random numbers of one answer [count], a pure function of `key`, whose parts are not negative."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key)))).random(count)


class ModelCalls:
    """How the model is called: alone, as here, or by all ranks together."""

    def mode(self) -> AbstractContextManager[Any]:
        """Return the context that answers are made in."""
        return torch.inference_mode()

    def go_on(self, under_way: bool) -> bool:
        """Tell whether one more call is to be made; `under_way`: some row here needs it."""
        return under_way

    def logits(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` finds; it calls the model's modules."""
        return compute()


def sample_answers(
    model: Any,
    prompts: Sequence[Ids],
    draws: Sequence[Uniforms],
    decoding: Decoding,
    device: torch.device,
    calls: ModelCalls | None = None,
) -> list[Sampled]:
    """Return one answer per prompt, in order. `model`: a transformers causal language model in evaluation mode;
    `draws`: random numbers of each answer, at least as many as it may have tokens; `calls`: how the model is called,
    None: alone. More calls than the rows here need do them no harm."""
    calls = calls or ModelCalls()
    with calls.mode():
        batch = _Decoder(model, prompts, draws, decoding, device)
        while calls.go_on(batch.under_way):
            batch.advance(calls)
    return batch.answers()


class _Decoder:
    """The rows of one batch, while they are being answered."""

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
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache: Any = DynamicCache()
        self._draws = torch.from_numpy(np.stack([row[: decoding.max_new_tokens] for row in draws])).to(device)
        self._ends = torch.tensor(decoding.ends, dtype=torch.int64, device=device)
        self._rows = torch.arange(len(prompts), device=device)
        self._finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self._said: list[list[int]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self._step = 0

    @property
    def under_way(self) -> bool:
        return self._step < self._decoding.max_new_tokens and not bool(self._finished.all())

    def advance(self, calls: ModelCalls) -> None:
        """Draw the next token of every row that is under way."""
        chosen = draw(calls.logits(self._logits), self._draws[self._rows, self._step], self._decoding)
        self._keep(chosen)
        self._step += 1
        self._input = chosen[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(chosen), 1)], dim=-1)
        self._positions = self._positions[:, -1:] + 1
        self._compact()

    def _logits(self) -> Tensor:
        """Return the logits [B, V] of every row's next token."""
        output = self._decoder(
            input_ids=self._input,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = self._head(output.last_hidden_state[:, -1])
        return logits

    def _keep(self, chosen: Tensor) -> None:
        ended = torch.isin(chosen, self._ends)
        live = (~self._finished).tolist()
        for row, token, is_end, is_live in zip(self._rows.tolist(), chosen.tolist(), ended.tolist(), live, strict=True):
            if is_live:
                self._said[row].append(token)
                self._ended[row] = is_end
        self._finished = self._finished | ended

    def _compact(self) -> None:
        """Take finished rows out, so that nothing is computed for them."""
        live = torch.nonzero(~self._finished)[:, 0]
        if not 0 < len(live) < COMPACT_BELOW * len(self._finished):
            return
        self._cache.batch_select_indices(live)
        self._rows, self._finished = self._rows[live], self._finished[live]
        self._input, self._mask, self._positions = self._input[live], self._mask[live], self._positions[live]

    def answers(self) -> list[Sampled]:
        return [Sampled(np.array(ids, np.int32), ended) for ids, ended in zip(self._said, self._ended, strict=True)]


class _OutputLayer:
    """The head in the states' format, as the training's log-probabilities take it (`train/log_probs.py`): while
    training its own weight may be in fp32, the rest in bf16."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._dtype = next(layer.parameters()).dtype
        self._weight: Tensor | None = None
        self._is_plain = type(layer) is nn.Linear and not hasattr(layer.weight, "ds_id")  # ZeRO-3 gathers in a call

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits [B, V] of states [B, D]."""
        if not self._is_plain or self._dtype is states.dtype:
            logits: Tensor = self._layer(states.to(self._dtype))
            return logits
        if self._weight is None:
            self._weight = self._layer.weight.to(states.dtype)
        bias = self._layer.bias
        return nn.functional.linear(states, self._weight, None if bias is None else bias.to(states.dtype))


def draw(logits: Tensor, numbers: Tensor, decoding: Decoding) -> Tensor:
    """Return the token [B] at which the cumulated probability of `logits` [B, V] passes each row's number [B], which
    is in [0, 1). With `top_p` only the likeliest tokens that make up that share of the probability can be drawn."""
    logits = logits.float()
    if decoding.temperature != 1.0:
        logits = logits / decoding.temperature
    p = torch.softmax(logits, dim=-1).double()
    if decoding.top_p < 1.0:
        p = _nucleus(p, decoding.top_p)
    mass = p.cumsum(-1)
    total = mass[:, -1]
    wanted = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))  # a product may round up
    return torch.searchsorted(mass, wanted[:, None], right=True)[:, 0]


def _nucleus(p: Tensor, share: float) -> Tensor:
    """Return `p` [B, V] with 0 for every token behind the likeliest ones that make up `share`."""
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(before >= share, 0.0))
