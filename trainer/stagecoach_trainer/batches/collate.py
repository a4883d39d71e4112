"""Conversion of rows to the tensors of a micro-batch.

B rows, T positions of the longest row, M positions with loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stagecoach_trainer.batches.rows import IGNORE, Row

PADDING_TOKEN = 0
"""Id after the end of short rows, which causal attention never reads there. Any id would do."""


@dataclass(frozen=True)
class RowBatch:
    """One micro-batch of rows, as input of the model."""

    tokens: Tensor
    """Token ids [B, T], padded on the right."""

    positions: Tensor | None
    """Position of each token in its sample [B, T]; None if every row is one sample."""

    loss_at: Tensor
    """Positions with loss, as indices into the flattened [B · T], ascending [M]."""

    targets: Tensor
    """Ids to predict at those positions [M]."""

    filled: Tensor | None = None
    """Positions that hold a token, not padding, as `loss_at`, ascending [N]; None if there is no padding."""

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> RowBatch:
        """Copy to a device, asynchronously from pinned memory."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> RowBatch:
        """Copy to page-locked memory, from which a GPU copies while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> RowBatch:
        positions = None if self.positions is None else change(self.positions)
        filled = None if self.filled is None else change(self.filled)
        return RowBatch(change(self.tokens), positions, change(self.loss_at), change(self.targets), filled)


def collate(rows: Sequence[Row]) -> RowBatch:
    """Return rows as one micro-batch, padded on the right to the longest of them.

    There is no attention mask: with one, or with a cache, transformers lets packed samples see each other. An empty
    micro-batch becomes one token without loss, so that a rank without work still takes part in collective calls.
    """
    length = max((row.num_tokens for row in rows), default=1)
    num_rows = max(1, len(rows))
    tokens = np.full((num_rows, length), PADDING_TOKEN, dtype=np.int64)
    labels = np.full((num_rows, length), IGNORE, dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, : row.num_tokens] = row.tokens
        labels[index, : row.num_tokens] = row.labels
    flat = labels.reshape(-1)  # only positions with loss reach the head, as indices into the flattened batch
    loss_at = np.flatnonzero(flat != IGNORE)
    packed = any(len(row.lengths) > 1 for row in rows)
    return RowBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(_positions(rows, length)) if packed else None,
        loss_at=torch.from_numpy(loss_at),
        targets=torch.from_numpy(flat[loss_at]),
        filled=_filled(rows, length),
    )


def _filled(rows: Sequence[Row], length: int) -> Tensor | None:
    """Return the indices of places with a token; None if there is no padding."""
    places = [index * length + np.arange(row.num_tokens) for index, row in enumerate(rows)]
    padded = any(row.num_tokens < length for row in rows)
    return torch.from_numpy(np.concatenate(places)) if padded else None


def _positions(rows: Sequence[Row], length: int) -> np.ndarray:
    """Return positions [B, T] that start at 0 with each sample and with the padding.

    transformers separates packed samples where positions restart, so padding becomes a sample of its own.
    """
    positions = np.empty((len(rows), length), dtype=np.int64)
    for index, row in enumerate(rows):
        lengths = [*row.lengths, length - row.num_tokens]
        positions[index] = np.concatenate([np.arange(size, dtype=np.int64) for size in lengths])
    return positions
