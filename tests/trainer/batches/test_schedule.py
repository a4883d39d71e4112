"""Learning rates against their closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.training import Schedule, ScheduleName
from stagecoach_trainer.batches.schedule import learning_rate

HIGHEST = 3e-4


def rates(schedule: Schedule, num_steps: int) -> list[float]:
    return [learning_rate(schedule, HIGHEST, step, num_steps) for step in range(num_steps)]


def test_the_warm_up_rises_in_equal_steps_and_reaches_the_highest_rate_after_it() -> None:
    found = rates(Schedule(name="constant", warmup_steps=4), 6)
    assert found == pytest.approx([HIGHEST * part for part in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0)])


def test_a_cosine_falls_along_the_cosine_to_its_floor() -> None:
    found = rates(Schedule(name="cosine", floor=0.1), 8)
    expected = [HIGHEST * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2) for step in range(8)]
    assert found == pytest.approx(expected)


def test_a_line_falls_evenly_after_the_warm_up() -> None:
    found = rates(Schedule(name="linear", warmup_share=0.5), 8)
    assert found[4:] == pytest.approx([HIGHEST * part for part in (1.0, 0.75, 0.5, 0.25)])


def test_wsd_stays_and_falls_over_the_last_share_of_the_steps() -> None:
    found = rates(Schedule(name="wsd", decay_share=0.4, floor=0.5), 10)
    assert found[:6] == pytest.approx([HIGHEST] * 6)
    assert found[6:] == pytest.approx([HIGHEST * part for part in (1.0, 0.875, 0.75, 0.625)])


@given(
    name=st.sampled_from(list(ScheduleName)),
    warmup=st.floats(0.0, 1.0),
    floor=st.floats(0.0, 1.0),
    num_steps=st.integers(1, 300),
)
def test_no_step_has_rate_0_or_one_above_the_peak(
    name: ScheduleName, warmup: float, floor: float, num_steps: int
) -> None:
    schedule = Schedule(name=name, warmup_share=warmup, floor=floor)
    assert all(0.0 < rate <= HIGHEST * (1 + 1e-12) for rate in rates(schedule, num_steps))
