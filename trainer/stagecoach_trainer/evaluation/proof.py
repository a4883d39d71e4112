"""Proof that a release equals the model it was made from: equal next-token distributions after reloading it.

T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagecoach_trainer.runtime.errors import UserError

ROW_TOKENS = 128
"""Tokens of one row of the proof's input; bounds the memory to T · V log-probabilities."""


@dataclass(frozen=True)
class Divergence:
    """The divergence between two models' next-token distributions."""

    mean_kl: float
    """Nats per token, over all tokens."""

    max_kl: float
    """Nats, of the token with the largest divergence."""

    same_first: float
    """Share of positions at which both models rank the same token first."""


def proof_rows(vocabulary: int, num_tokens: int, seed: int, positions: int | None) -> list[Tensor]:
    """Return `num_tokens` ids in rows [T], drawn uniformly from the whole vocabulary, so that added rows are
    included."""
    length = min(ROW_TOKENS, positions or ROW_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return [ids[start : start + length] for start in range(0, num_tokens, length)]


def log_probabilities(model: Any, rows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the model's log-probabilities of the next token, fp32 [T, V] per row, on the CPU."""
    for row in rows:
        with torch.inference_mode():
            logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0]
            yield torch.log_softmax(logits.float(), dim=-1).cpu()


class StoredLogProbs:
    """A model's log-probabilities on the proof's rows, stored on disk so that the model can be released before another
    one is loaded.

    Raises UserError if they are NaN or infinite.
    """

    def __init__(self, model: Any, rows: Sequence[Tensor], folder: Path) -> None:
        self._rows = rows
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for index, before in enumerate(log_probabilities(model, rows)):
            if not bool(torch.isfinite(before).all()):
                raise UserError(
                    "proof: the logits of the model before its release are NaN or infinite; its weights are damaged"
                )
            np.save(self._file(index), before.numpy(), allow_pickle=False)

    def _file(self, index: int) -> Path:
        return self._folder / f"row-{index:06d}.npy"

    def compare(self, model: Any) -> Divergence:
        """Return KL(before ‖ `model`).

        Raises UserError if `model` has a vocabulary of another size, or its logits are NaN or infinite.
        """
        sum_, largest, same, count = 0.0, 0.0, 0, 0
        for index, after in enumerate(log_probabilities(model, self._rows)):
            before = torch.from_numpy(np.load(self._file(index), allow_pickle=False))
            if before.shape != after.shape:
                raise UserError(f"proof: the vocabulary had {before.shape[1]} rows before and has {after.shape[1]} now")
            kl = kl_divergence(before, after)
            if not bool(torch.isfinite(kl).all()):
                raise UserError("proof: the logits of the released model are NaN or infinite")
            sum_ += float(kl.sum())
            largest = max(largest, float(kl.max()))
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            count += len(kl)
        return Divergence(sum_ / count, largest, same / count)


def kl_divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return Σ_v p(v) · (log p(v) - log q(v)) per token, fp64 [T], of log-probabilities [T, V]."""
    # fp64: the terms cancel, and the result can be much smaller than each of them.
    before, after = before.double(), after.double()
    return (before.exp() * (before - after)).sum(-1)
