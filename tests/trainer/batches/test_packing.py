"""Packing: every sample once, no row too long, little unused space."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_trainer.batches.packing import one_per_row, pack


def check(lengths: np.ndarray, capacity: int) -> int:
    """Check that a packing is valid; return its rows."""
    packed = pack(lengths, capacity)
    assert sorted(packed.order.tolist()) == list(range(len(lengths)))
    sums = [int(lengths[packed.samples(row)].sum()) for row in range(len(packed))]
    assert all(0 < total <= capacity for total in sums)
    return len(packed)


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_sample_is_in_exactly_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = check(np.array(lengths, np.int32), 64)
    assert rows >= -(-sum(lengths) // 64)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=12))
def test_small_packings_need_at_most_one_row_more_than_the_best(lengths: list[int]) -> None:
    def best(remaining: tuple[int, ...], room: tuple[int, ...]) -> int:
        if not remaining:
            return len(room)
        first, rest = remaining[0], remaining[1:]
        choices = {value: index for index, value in enumerate(room) if value >= first}
        found = [best(rest, (*room[:index], room[index] - first, *room[index + 1 :])) for index in choices.values()]
        return min([*found, best(rest, (*room, 10 - first))])

    ordered = tuple(sorted(lengths, reverse=True))
    assert check(np.array(lengths), 10) <= best(ordered, ()) + 1


def test_a_hundred_thousand_lognormal_lengths_are_packed_without_waste_and_at_once() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.4, 0.9, 100_000), 1, 2048).astype(np.int32)
    start = time.perf_counter()
    packed = pack(lengths, 2048)
    seconds = time.perf_counter() - start
    useful = lengths.sum() / (len(packed) * 2048)
    assert useful >= 0.999
    assert seconds < 1.0
    assert sorted(packed.order.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize(("low", "high"), [(1025, 2048), (683, 1024), (1, 8)])
def test_lengths_that_fit_badly_need_the_least_possible_rows(low: int, high: int) -> None:
    lengths = np.random.default_rng(1).integers(low, high, 5000, endpoint=True)
    per_row = 2048 // low if low > 8 else None
    least = -(-len(lengths) // per_row) if per_row else -(-int(lengths.sum()) // 2048)
    assert check(lengths, 2048) == least


def test_equal_lengths_are_taken_in_the_order_of_the_tie_break() -> None:
    packed = pack(np.array([4, 4, 4, 4]), 8, tie_break=np.array([3, 1, 0, 2]))
    assert packed.order.tolist() == [2, 1, 3, 0]


def test_rows_of_one_sample_and_no_samples() -> None:
    assert [one_per_row(3).samples(row).tolist() for row in range(3)] == [[0], [1], [2]]
    assert len(pack(np.empty(0, np.int32), 8)) == 0


@pytest.mark.parametrize("lengths", [[0, 1], [9]])
def test_lengths_that_cannot_be_packed_are_rejected(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.array(lengths), 8)
