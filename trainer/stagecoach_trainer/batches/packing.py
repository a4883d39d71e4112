"""Packing of samples into rows of at most `capacity` tokens with little unused space.

Best fit over the histogram of lengths (arXiv 2404.10830 fills bins the same way, one sample at a time): a row takes the
longest sample that still fits until none does, and its pattern of lengths is repeated while there are samples for it.
Samples of equal length are handled together, so the work grows with the number of distinct lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedRows:
    """The samples of each row."""

    order: Int64
    """Sample numbers, row after row [N]."""

    starts: Int64
    """Index in `order` of each row's first sample, then the end [R + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def samples(self, row: int) -> Int64:
        """Return the numbers of a row's samples, the longest first."""
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(
    lengths: npt.NDArray[np.integer], capacity: int, tie_break: npt.NDArray[np.integer] | None = None
) -> PackedRows:
    """Pack samples of `lengths` [N], each from 1 to `capacity`, into rows; every sample is in exactly one row.

    `tie_break` [N]: the order of samples of equal length; by default that of `lengths`. Raises ValueError for a length
    outside 1..capacity.
    """
    if len(lengths) == 0:
        return PackedRows(np.empty(0, np.int64), np.zeros(1, np.int64))
    if int(lengths.min()) < 1 or int(lengths.max()) > capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit rows of {capacity}")
    by_length = np.argsort(lengths, kind="stable") if tie_break is None else np.lexsort((tie_break, lengths))
    counts = np.bincount(lengths, minlength=capacity + 1).astype(np.int64)
    taken = np.concatenate([[0], np.cumsum(counts)])[: capacity + 1]
    orders: list[Int64] = []
    sizes: list[Int64] = []
    for pattern, times in _patterns(counts, capacity):
        columns = []
        for length, number in pattern:
            first = taken[length]
            columns.append(by_length[first : first + number * times].reshape(times, number))
            taken[length] += number * times
        rows = np.concatenate(columns, axis=1)
        orders.append(rows.ravel())
        sizes.append(np.full(times, rows.shape[1], np.int64))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return PackedRows(np.concatenate(orders).astype(np.int64), starts.astype(np.int64))


def one_per_row(num_samples: int) -> PackedRows:
    """Return rows of one sample each."""
    return PackedRows(np.arange(num_samples, dtype=np.int64), np.arange(num_samples + 1, dtype=np.int64))


def _patterns(counts: Int64, capacity: int) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Yield (pairs of a length and its number in a row, number of such rows), until no sample is left."""
    left: list[int] = counts.tolist()
    below = list(range(capacity + 1))  # below[x] ≤ x is an upper bound of the longest length left up to x

    def longest(limit: int) -> int:
        """Return the longest length ≤ limit of a sample that is left, or 0."""
        found = limit
        while found and not left[found]:
            below[found] = min(below[found], found - 1)
            found = below[found]
        while below[limit] > found:  # path compression, as in a union-find forest: the next search is shorter
            below[limit], limit = found, below[limit]
        return found

    longest_left = longest(capacity)
    while longest_left:
        pattern: list[tuple[int, int]] = []
        room, length = capacity, longest_left
        while length:
            number = min(room // length, left[length])
            pattern.append((length, number))
            room -= number * length
            length = longest(min(room, length - 1))  # next, a shorter length that still fits
        times = min(left[length] // number for length, number in pattern)
        for length, number in pattern:
            left[length] -= number * times
        yield pattern, times
        longest_left = longest(longest_left)
