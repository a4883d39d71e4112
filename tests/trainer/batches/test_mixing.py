"""Mixing: exact shares, nothing lost or repeated within a pass, any position computed directly."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_trainer.batches.mixing import Mix, Stream, apportion, make_key, permute, splitmix

pytestmark = pytest.mark.slow


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_shuffle_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_shuffles_differ_by_key_and_look_random() -> None:
    size = 4096
    one, two = (permute(np.arange(size), size, key) for key in (1, 2))
    assert not np.array_equal(one, two)
    assert abs(np.corrcoef(np.arange(size), one)[0, 1]) < 0.05
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05
    assert abs(np.mean(np.abs(np.diff(one))) - size / 3) < size / 30


def test_splitmix_is_the_published_generator() -> None:
    state = np.array([1234567], np.uint64)
    assert int(splitmix(state)[0]) == 6457827717110365317


@given(st.integers(0, 10_000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_apportioned_parts_add_up_and_are_within_one_of_their_share(total: int, shares: list[float]) -> None:
    parts = apportion(total, shares)
    assert sum(parts) == total
    assert all(abs(part - total * share / sum(shares)) < 1 for part, share in zip(parts, shares, strict=True))


def make_mix(sizes: list[int], shares: list[float], total: int, first: list[int] | None = None) -> Mix:
    streams = [Stream(size, make_key(5, index)) for index, size in enumerate(sizes)]
    return Mix(streams, shares, total, key=9, first_draws=first or [0] * len(sizes))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 10)), min_size=1, max_size=4),
    st.integers(1, 300),
    st.integers(1, 300),
)
def test_every_pass_over_a_set_is_complete_before_the_next_begins(
    sets: list[tuple[int, float]], total: int, more: int
) -> None:
    sizes, shares = [size for size, _ in sets], [share for _, share in sets]
    first = make_mix(sizes, shares, total)
    second = make_mix(sizes, shares, more, first.next_draws)
    seen: list[Counter[int]] = [Counter() for _ in sizes]
    for mix, length in ((first, total), (second, more)):
        draws = mix.draws(0, length)
        assert len(draws.sets) == length
        for index, unit in zip(draws.sets.tolist(), draws.units.tolist(), strict=True):
            seen[index][unit] += 1
    for index, counter in enumerate(seen):
        drawn = first.drawn[index] + second.drawn[index]
        assert sum(counter.values()) == drawn
        passes, rest = divmod(drawn, sizes[index])
        expected = {passes + 1: rest, passes: sizes[index] - rest}
        assert Counter(counter.values()) == {times: units for times, units in expected.items() if times and units}


@given(st.integers(1, 500), st.integers(0, 400), st.integers(1, 50))
def test_any_range_is_found_without_those_before_it(total: int, start: int, length: int) -> None:
    mix = make_mix([17, 50, 3], [1.0, 2.0, 0.5], total)
    whole, part = mix.draws(0, total), mix.draws(start, start + length)
    assert np.array_equal(whole.sets[start : start + length], part.sets)
    assert np.array_equal(whole.units[start : start + length], part.units)


def test_shares_are_exact_in_every_epoch_and_in_the_rest() -> None:
    mix = make_mix([60, 30, 10], [0.7, 0.2, 0.1], 250)
    sets = mix.draws(0, 250).sets
    for start, stop in ((0, 100), (100, 200), (200, 250)):
        counts = np.bincount(sets[start:stop], minlength=3)
        assert counts.tolist() == [round(share * (stop - start)) for share in (0.7, 0.2, 0.1)]
    assert make_mix([1000, 1000], [3.0, 1.0], 40).drawn == [30, 10]


def test_order_differs_from_epoch_to_epoch() -> None:
    draws = make_mix([64], [1.0], 128).draws(0, 128)
    assert not np.array_equal(draws.units[:64], draws.units[64:])


def test_a_far_position_costs_no_more_than_a_near_one() -> None:
    mix = make_mix([10**8, 10**7], [1.0, 1.0], 10**11)

    def seconds(position: int) -> float:
        start = time.perf_counter()
        mix.draws(position, position + 256)
        return time.perf_counter() - start

    mix.draws(0, 10)
    assert min(seconds(10**11 - 5000) for _ in range(5)) < 20 * min(seconds(0) for _ in range(5))


@pytest.mark.parametrize("shares", [[1.0, 0.0], [0.0, 1.0]])
def test_a_set_without_share_is_never_drawn(shares: list[float]) -> None:
    assert set(make_mix([5, 5], shares, 20).draws(0, 20).sets.tolist()) == {shares.index(1.0)}
