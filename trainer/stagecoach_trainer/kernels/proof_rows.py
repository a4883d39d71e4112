"""The few rows on which a loss module is compared with transformers' own forward pass.

K predicted positions, B rows, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stagecoach_trainer.batches.rows import IGNORE, Ids, Row

LONGEST = 128
"""Upper limit of the tokens of a row. A row is a quarter of a typical row of training; three of them cost less than
one micro-batch."""

SHORT = 16
"""Upper limit of the tokens of rows of which gradients are computed."""

WITHOUT_LOSS = 3
"""One position of so many has no loss, so that the parts that compute only positions with loss are proved as well."""


@dataclass(frozen=True)
class ProofRows:
    """Three rows: one of a stage's samples, the same with its later tokens changed, and a shorter one."""

    rows: tuple[Ids, Ids, Ids]

    num_equal: int
    """Tokens at the start of the first two rows that are equal."""

    @classmethod
    def of(cls, samples: Sequence[Ids], vocabulary: int) -> ProofRows:
        """Return the rows made of a stage's samples, or of the first ids of the vocabulary if none has two tokens."""
        longest = max(samples, key=len, default=np.empty(0, np.int32))[:LONGEST]
        if len(longest) < 2:
            longest = np.arange(min(vocabulary, LONGEST // 4), dtype=np.int32)
        half = len(longest) // 2
        changed = longest.copy()
        changed[half:] = (changed[half:] + 1) % vocabulary
        return cls((longest, changed, longest[: max(2, len(longest) * 2 // 3)]), half)

    @property
    def short(self) -> ProofRows:
        """The beginnings of the rows, for what costs more than the loss.

        They are equally long: at padding, which has no loss, a model may have gradients that are not finite (Gemma 3n).
        """
        length = min(SHORT, *map(len, self.rows))
        first, changed, last = (ids[:length] for ids in self.rows)
        return ProofRows((first, changed, last), min(self.num_equal, length))

    @property
    def masked_rows(self) -> list[Row]:
        """The rows with the next token as label, except at every third position."""
        return [Row(ids, _labels(ids), (len(ids),)) for ids in self.rows]

    @property
    def tokens(self) -> Tensor:
        """Token ids [B, T], padded on the right by the row's first token: an id that the model surely reads."""
        length = max(len(ids) for ids in self.rows)
        return torch.tensor([[*ids, *ids[:1].repeat(length - len(ids))] for ids in self.rows]).long()

    @property
    def mask(self) -> Tensor:
        """Whether there is a token at each position [B, T], as 0 and 1."""
        length = max(len(ids) for ids in self.rows)
        return torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in self.rows])

    @property
    def labels(self) -> Tensor:
        """transformers' labels [B, T], which are not shifted, of `masked_rows`."""
        length = max(len(ids) for ids in self.rows)
        found = np.full((len(self.rows), length), IGNORE, np.int64)
        for place, row in zip(found, self.masked_rows, strict=True):
            place[1 : row.num_tokens] = row.labels[:-1]
        return torch.from_numpy(found)


def _labels(ids: Ids) -> np.ndarray:
    labels = np.append(ids[1:], IGNORE).astype(np.int32)
    labels[WITHOUT_LOSS - 1 :: WITHOUT_LOSS] = IGNORE
    return labels
