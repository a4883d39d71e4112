"""Division of rows among ranks, and their conversion to tensors."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import IGNORE
from stagecoach_trainer.batches.shard import shard_batch
from tests.trainer.loop.makers import row


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12), micro=st.integers(1, 5), ranks=st.integers(1, 4))
def test_every_row_is_assigned_once_and_all_ranks_have_as_many_micro_batches(
    lengths: list[int], micro: int, ranks: int
) -> None:
    rows = [row((length,), index) for index, length in enumerate(lengths)]
    shares = [shard_batch(rows, micro, rank, ranks) for rank in range(ranks)]
    dealt = [id(item) for share in shares for batch in share.micro_batches for item in batch]
    assert sorted(dealt) == sorted(map(id, rows))
    assert len({len(share.micro_batches) for share in shares}) == 1
    assert all(len(batch) <= micro for share in shares for batch in share.micro_batches)
    assert {share.num_targets for share in shares} == {sum(item.num_targets for item in rows)}


def test_short_rows_are_padded_on_the_right_without_loss() -> None:
    batch = collate([row((5,), 1), row((3,), 2)])
    assert batch.tokens.shape == (2, 5)
    assert batch.tokens[1, 3:].tolist() == [0, 0]
    assert batch.positions is None
    assert batch.loss_at.tolist() == [0, 1, 2, 3, 5, 6]


def test_packed_rows_get_positions_that_start_again_with_each_sample() -> None:
    batch = collate([row((3, 2), 1), row((2,), 2)])
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


def test_targets_are_the_labels_at_the_positions_with_loss() -> None:
    item = row((6, 4), 3, masked_share=0.5)
    batch = collate([item])
    wanted = np.flatnonzero(item.labels != IGNORE)
    assert batch.loss_at.tolist() == wanted.tolist()
    assert batch.targets.tolist() == item.labels[wanted].tolist()


def test_an_empty_micro_batch_is_one_token_without_loss() -> None:
    batch = collate([])
    assert batch.tokens.shape == (1, 1)
    assert len(batch.targets) == 0
