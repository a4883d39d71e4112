"""The ledger of an attempt's time: every second in one category."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_core.goodput import HOLDING, MAX_MARKS, Ledger, Spent, goodput, spent_on


def trained(*steps: tuple[float, float]) -> Ledger:
    """A ledger of an attempt that trains from time 0 and reaches steps at times."""
    ledger = Ledger(0.0, Spent.TRAINING)
    for now, step in steps:
        ledger = ledger.reach(now, step)
    return ledger


@pytest.mark.parametrize(
    ("activity", "unit", "what"),
    [
        ("train", "steps", Spent.TRAINING),
        ("held out", "steps", Spent.EVALUATE),
        ("resume", "steps", Spent.RESTORE),
        ("load libraries", "", Spent.COMPILE),
        ("fetch", "", Spent.FETCH),
        ("publish", "files", Spent.SAVE),
        ("tokenise", "tokens", Spent.TRAINING),
    ],
)
def test_an_activity_has_one_category(activity: str, unit: str, what: Spent) -> None:
    assert spent_on(activity, unit) is what


EVENTS = st.lists(
    st.tuples(st.floats(-10, 1e6), st.sampled_from(Spent), st.one_of(st.none(), st.floats(0, 1e9))), max_size=40
)


@given(EVENTS, st.booleans(), st.one_of(st.none(), st.floats(0, 1e9)))
def test_the_categories_add_up_to_the_time_that_has_passed_whatever_is_reported(
    events: list[tuple[float, Spent, float | None]], hung: bool, saved: float | None
) -> None:
    ledger = Ledger(0.0)
    for now, what, step in events:
        ledger = ledger.enter(now, what)
        ledger = ledger if step is None else ledger.reach(now, step)
    ledger = ledger.end(max(2e6, ledger.until), saved, hung)
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.until)
    assert all(seconds >= 0.0 for seconds in ledger.seconds.values())
    assert len(ledger.marks) <= MAX_MARKS


def test_training_after_the_last_checkpoint_of_a_failed_attempt_is_lost() -> None:
    ledger = trained((100.0, 10), (200.0, 20), (300.0, 30)).end(310.0, saved_step=20)
    assert ledger.seconds == {Spent.TRAINING: 200.0, Spent.LOST: 110.0}


def test_a_checkpoint_between_two_reports_keeps_its_share_of_the_time() -> None:
    ledger = trained((100.0, 10), (200.0, 20)).end(200.0, saved_step=15)
    assert ledger.seconds == {Spent.TRAINING: 150.0, Spent.LOST: 50.0}


def test_without_a_checkpoint_all_training_is_lost() -> None:
    ledger = trained((100.0, 10)).end(150.0, saved_step=None)
    assert ledger.seconds[Spent.LOST] == 150.0


def test_the_silence_before_a_hang_is_stopped_is_not_training() -> None:
    ledger = trained((100.0, 10)).end(700.0, saved_step=10, hung=True)
    assert ledger.seconds == {Spent.TRAINING: 100.0, Spent.HUNG: 600.0}


def test_steps_that_are_made_again_after_a_rollback_are_measured_from_their_second_time() -> None:
    ledger = trained((100.0, 10), (200.0, 20), (250.0, 5), (300.0, 10)).end(300.0, saved_step=10)
    assert ledger.seconds.get(Spent.LOST, 0.0) == 0.0


def test_goodput_counts_only_the_time_in_which_gpus_are_held() -> None:
    ledger = Ledger(0.0).enter(1000.0, Spent.COMPILE).enter(1010.0, Spent.TRAINING).at(1100.0)
    assert goodput([ledger]) == pytest.approx(0.9)
    assert goodput([Ledger(0.0).at(50.0)]) is None
    assert Spent.QUEUE not in HOLDING
