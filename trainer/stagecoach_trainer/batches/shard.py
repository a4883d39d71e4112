"""Sharing a global batch out over ranks and micro-batches: pure functions of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from stagecoach_trainer.batches.rows import Unit

AnyUnit = TypeVar("AnyUnit", bound=Unit)


@dataclass(frozen=True)
class RankBatch(Generic[AnyUnit]):
    """What one rank computes of one optimiser step."""

    micro_batches: tuple[tuple[AnyUnit, ...], ...]
    """As many on every rank; a short rank's last ones may be empty."""

    num_targets: int
    """Positions with loss in the whole global batch: the divisor of the loss."""

    num_tokens: int
    """Tokens of the whole global batch, padding apart."""


def shard_batch(
    rows: Sequence[AnyUnit], micro_batch_rows: int, rank: int = 0, world_size: int = 1
) -> RankBatch[AnyUnit]:
    """Return rank `rank`'s share of the global batch `rows`.

    Rows are dealt like cards, longest first, so that ranks get equal work and a micro-batch holds rows of like length.
    """
    ordered = sorted(rows, key=lambda row: -row.num_tokens)
    mine = ordered[rank::world_size]
    longest_hand = -(-len(ordered) // world_size)
    num_micro = max(1, -(-longest_hand // micro_batch_rows))
    micro = tuple(tuple(mine[at * micro_batch_rows : (at + 1) * micro_batch_rows]) for at in range(num_micro))
    return RankBatch(micro, sum(row.num_targets for row in rows), sum(row.num_tokens for row in rows))
