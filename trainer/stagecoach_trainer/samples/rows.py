"""Samples as rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stagecoach_trainer.batches.packing import pack
from stagecoach_trainer.batches.rows import IGNORE, Row
from stagecoach_trainer.samples.conversation import Sample


def row_of(sample: Sample) -> Row:
    """Return a sample as a row; label t is token t + 1 if that carries loss."""
    labels = np.full(len(sample.ids), IGNORE, np.int32)
    labels[:-1] = np.where(sample.trained[1:], sample.ids[1:], IGNORE)
    return Row(sample.ids, labels, (len(sample.ids),))


def pack_rows(pieces: Sequence[Row], sequence_length: int) -> list[Row]:
    """Pack samples into as few rows of `sequence_length` as best-fit packing finds."""
    packed = pack(np.array([piece.num_tokens for piece in pieces]), sequence_length)
    return [join_rows([pieces[index] for index in packed.samples(row)]) for row in range(len(packed))]


def join_rows(pieces: Sequence[Row]) -> Row:
    """Concatenate rows."""
    return Row(
        np.concatenate([piece.tokens for piece in pieces]),
        np.concatenate([piece.labels for piece in pieces]),
        tuple(length for piece in pieces for length in piece.lengths),
    )
