"""Division of a global batch among ranks and micro-batches: pure functions of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from stagecoach_trainer.batches.rows import Unit

AnyUnit = TypeVar("AnyUnit", bound=Unit)


@dataclass(frozen=True)
class RankBatch(Generic[AnyUnit]):
    """One rank's part of the global batch of an optimiser step."""

    micro_batches: tuple[tuple[AnyUnit, ...], ...]
    """The same number on every rank; the last ones of a rank with fewer rows may be empty."""

    num_targets: int
    """Positions with loss in the global batch: the divisor of the loss."""

    num_tokens: int
    """Tokens of the global batch, without padding."""


def shard_batch(
    rows: Sequence[AnyUnit], micro_batch_rows: int, rank: int = 0, world_size: int = 1
) -> RankBatch[AnyUnit]:
    """Return rank `rank`'s part of the global batch `rows`.

    Rows are assigned round-robin, longest first, so that ranks get equal work and the rows of a micro-batch have
    similar lengths.
    """
    ordered = sorted(rows, key=lambda row: -row.num_tokens)
    mine = ordered[rank::world_size]
    most_rows = -(-len(ordered) // world_size)  # of any rank: all make the same number of collective calls
    num_micro = max(1, -(-most_rows // micro_batch_rows))
    micro = tuple(tuple(mine[at * micro_batch_rows : (at + 1) * micro_batch_rows]) for at in range(num_micro))
    return RankBatch(micro, sum(row.num_targets for row in rows), sum(row.num_tokens for row in rows))
