"""The replay of a large training's faults on simulated time."""

from __future__ import annotations

import random

import pytest

from bench.fault_mix import DAY, FAULTS, GOAL, SIZES, Cluster, Simulation, figures, replay
from stagecoach_core.goodput import Spent
from stagecoach_core.values import RunState


def test_the_mix_is_the_published_one() -> None:
    assert sum(fault.count for fault in FAULTS.values()) == 419


def test_no_run_fails_of_faults_that_are_not_its_own_and_goodput_reaches_its_goal() -> None:
    outcomes = replay(len(SIZES))
    found = figures(outcomes)
    assert [item.state for item in outcomes] == [RunState.COMPLETE] * len(SIZES)
    assert found["goodput"] >= GOAL
    assert found["faults"] > 400  # about those of the largest run alone


def test_every_second_of_a_run_is_in_the_ledgers() -> None:
    outcome = Simulation("run", 4096, 5 * DAY, Cluster(), random.Random(1)).run()
    trained = sum(ledger.seconds[Spent.TRAINING] for ledger in outcome.ledgers)
    assert trained == pytest.approx(5 * DAY, rel=1e-3)  # what was lost is not counted twice
    begun = [ledger.until - sum(ledger.seconds.values()) for ledger in outcome.ledgers]
    ends = [ledger.until for ledger in outcome.ledgers]
    assert all(later >= earlier for earlier, later in zip(ends, begun[1:], strict=False))
