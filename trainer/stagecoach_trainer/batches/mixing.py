"""The order of training data: which unit (a row or a sample) of which set is at each position.

Everything is a pure function of (seed, position). Shuffling is a Feistel network over the positions, so nothing is
stored and a unit is found in constant time from any position, as after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

ROUNDS = 6
# SplitMix64's increment: 2^64 divided by the golden ratio, as an odd number.
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def splitmix(values: UInt64) -> UInt64:
    """Mix 64-bit values (the finaliser of SplitMix64, Steele, Lea and Flood 2014); vectorised."""
    mixed = values + np.uint64(GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def make_key(*parts: int) -> int:
    """Return a 64-bit key derived from several numbers in their order."""
    # An array, not a scalar: NumPy's arrays wrap around at 2^64 silently, its scalars warn of an overflow.
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix(key ^ splitmix(np.array([part & MASK], np.uint64)))
    return int(key[0])


def permute(positions: Int64, size: int, key: int) -> Int64:
    """Return the image of each position [N] under a permutation of 0..size-1 that `key` selects.

    A balanced Feistel network over the next power of four. Values outside the range pass through it again (cycle
    walking, Black and Rogaway 2002), less than four times on average.
    """
    if size <= 1:
        return np.zeros_like(positions)
    half = np.uint64(((size - 1).bit_length() + 1) // 2)  # bits of each half: the domain is at most 4 · size
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(make_key(key, number)) for number in range(ROUNDS)]

    def once(values: UInt64) -> UInt64:
        left, right = values >> half, values & low
        for round_key in keys:
            left, right = right, left ^ (splitmix(right ^ round_key) & low)
        return (left << half) | right

    # Cycle walking: the network permutes its whole domain, so repeated application returns to 0..size-1.
    result = once(positions.astype(np.uint64))
    outside = result >= size
    while outside.any():
        result[outside] = once(result[outside])
        outside = result >= size
    return result.astype(np.int64)


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide `total` into whole numbers in proportion to `shares`, by largest remainder; ties go to the first."""
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: (parts[index] - exact[index], index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


@dataclass(frozen=True)
class Stream:
    """Repeated passes over one set. Each pass is a permutation of its own, so each unit occurs once per pass."""

    size: int
    key: int

    def units(self, draws: Int64) -> Int64:
        """Return the units [N] of the given draws [N], which are counted from the start of the first pass."""
        passes = draws // self.size
        found = np.empty_like(draws)
        for number in np.unique(passes):
            chosen = passes == number
            found[chosen] = permute(draws[chosen] % self.size, self.size, make_key(self.key, int(number)))
        return found


@dataclass(frozen=True)
class Draws:
    """The set and the unit at each of some positions."""

    sets: Int64
    units: Int64


class Mix:
    """A part of training that draws `total` units from several streams, in exact shares.

    Positions are divided into epochs of as many units as all sets have; the last epoch is the rest. In each epoch every
    set has its exact share by largest remainder, and positions are shuffled. A stream continues from epoch to epoch,
    starting with `first_draws`, at which an earlier part of training stopped.
    """

    def __init__(
        self, streams: Sequence[Stream], shares: Sequence[float], total: int, key: int, first_draws: Sequence[int]
    ) -> None:
        self._streams = streams
        self._key = key
        self._first = np.array(first_draws, np.int64)
        self._epoch_size = max(1, min(total, sum(stream.size for stream in streams)))
        self._full_epochs, rest = divmod(total, self._epoch_size)
        self._parts = np.array(apportion(self._epoch_size, shares), np.int64)
        self._last_parts = np.array(apportion(rest, shares), np.int64)
        self.total = total

    @property
    def drawn(self) -> list[int]:
        """The number of units drawn from each stream."""
        return [int(number) for number in self._full_epochs * self._parts + self._last_parts]

    @property
    def next_draws(self) -> list[int]:
        """The first draw of each stream after this part of training."""
        return [int(first) + drawn for first, drawn in zip(self._first, self.drawn, strict=True)]

    def draws(self, start: int, stop: int) -> Draws:
        """Return the draws at the positions from `start` up to, but without, `stop`; fewer at the end."""
        positions = np.arange(start, min(stop, self.total), dtype=np.int64)
        sets, units = np.empty_like(positions), np.empty_like(positions)
        epochs = positions // self._epoch_size
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sets[here], units[here] = self._in_epoch(int(epoch), positions[here] % self._epoch_size)
        return Draws(sets, units)

    def _in_epoch(self, epoch: int, positions: Int64) -> tuple[Int64, Int64]:
        parts = self._parts if epoch < self._full_epochs else self._last_parts
        shuffled = permute(positions, int(parts.sum()), make_key(self._key, epoch))
        # Before the shuffle, an epoch is a block for each set: the shuffled position gives the set and the draw in it.
        ends = np.cumsum(parts)
        sets = np.searchsorted(ends, shuffled, side="right").astype(np.int64)
        # All epochs before this one were full, so each of them drew `_parts`, also if this one is the rest.
        draws = shuffled - (ends - parts)[sets] + self._first[sets] + epoch * self._parts[sets]
        units = np.empty_like(draws)
        for index in np.unique(sets):
            chosen = sets == index
            units[chosen] = self._streams[int(index)].units(draws[chosen])
        return sets, units
