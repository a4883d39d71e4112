"""The remaining time of an activity, from its pace."""

from __future__ import annotations

import pytest

from stagecoach_api.progress import Pace, ProgressEvent, trainer_status


def event(time: float, done: float, activity: str = "train", total: float = 100.0) -> ProgressEvent:
    return ProgressEvent(time=time, activity=activity, done=done, total=total, unit="steps")


def end_after(*events: ProgressEvent) -> float | None:
    pace = Pace()
    for item in events:
        pace.add(item)
    return pace.end()


def test_the_end_follows_from_the_steps_made() -> None:
    assert end_after(event(0.0, 10), event(30.0, 40)) == pytest.approx(90.0)


def test_the_end_is_unknown_before_two_points_and_without_a_total() -> None:
    assert end_after() is None
    assert end_after(event(0.0, 10)) is None
    assert end_after(event(0.0, 10), event(5.0, 10)) is None
    unlimited = [ProgressEvent(time=float(time), activity="read", done=time, unit="records") for time in range(3)]
    assert end_after(*unlimited) is None


def test_only_the_last_minute_counts_but_at_least_five_points() -> None:
    slow = [event(100.0 * step, step) for step in range(3)]
    slow_then_fast = slow + [event(200.0 + step, 2 + step) for step in range(62)]
    assert end_after(*slow_then_fast) == pytest.approx(261.0 + (100 - 63), abs=1.5)
    slow = [event(600.0 * step, step) for step in range(8)]
    assert end_after(*slow) == pytest.approx(600.0 * 100)


def test_measuring_between_steps_keeps_the_pace_and_its_time_counts() -> None:
    """Ten steps of a second each, then ten seconds of measuring: two seconds a step."""
    steps = [event(float(step), step) for step in range(1, 11)]
    measuring = [event(11.0 + second, 10, "measure") for second in range(10)]
    assert end_after(*steps, *measuring) == pytest.approx(100.0)
    assert end_after(*steps, *measuring, event(21.0, 11)) == pytest.approx(21.0 + 89 * 20 / 10)


def test_a_rollback_starts_over() -> None:
    assert end_after(event(0.0, 10), event(1.0, 60), event(2.0, 20)) is None
    assert end_after(event(0.0, 10), event(1.0, 60), event(2.0, 20), event(4.0, 21)) == pytest.approx(4.0 + 2 * 79)


def test_another_activity_has_its_own_pace() -> None:
    reading = ProgressEvent(time=10.0, activity="read", done=1, total=5.0, unit="files")
    assert end_after(event(0.0, 10), event(1.0, 20), reading) is None


def test_a_report_to_the_operator_omits_a_time_that_is_not_known() -> None:
    assert "estimatedRemainingSeconds" not in trainer_status(event(0.0, 1), None)["trainerStatus"]
