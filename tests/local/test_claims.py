"""Claims: two drivers on one storage do not do the same work, and a dead one does not delay the others for long."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest

from stagecoach_api.store import Store
from stagecoach_core.values import RunState
from stagecoach_local.claims import FOLDER, Claim, Claims, FileClaims, Holder, LeaseClaims, lease_content, lease_keys
from stagecoach_local.driver import Driver, Outcome
from tests.cli.conftest import s3_endpoint, store
from tests.cli.makers import Bench, Recorder, data_stage, export_stage, pretrain_stage, tokenizer_stage

__all__ = ["s3_endpoint", "store"]

DIGEST = "d" * 64
ELSEWHERE = Holder("elsewhere boot 1", 1, 0.0)
"""A process that cannot be looked at from here."""


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """Drivers that share a storage, each with a clock of its own."""

    store: Store
    taken: list[Claim] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)

    def driver(self, clock: Clock | None = None, renewal: float = 1000.0, holder: Holder = ELSEWHERE) -> LeaseClaims:
        holder = replace(holder, driver=str(next(self.numbers)))
        return LeaseClaims(self.store, holder, renewal_seconds=renewal, look_seconds=0.0, clock=clock or Clock())

    def take(self, claims: LeaseClaims) -> Claim | None:
        found = claims.take(DIGEST)
        if found is None or isinstance(found, Holder):
            return None
        self.taken.append(found)
        return found

    def leases(self) -> list[str]:
        return lease_keys(self.store, f"{FOLDER}/{DIGEST}")


@pytest.fixture
def world(store: Store) -> Iterator[World]:
    made = World(store)
    yield made
    for claim in made.taken:
        claim.release()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- leases ------------------------------------------------------------------------------------------------------------


def test_a_lease_has_one_holder_and_leaves_nothing_behind(world: World) -> None:
    first, second = world.driver(), world.driver(holder=Holder("third boot 1", 7, 0.0))
    claim = world.take(first)
    assert claim is not None
    found = second.take(DIGEST)
    assert isinstance(found, Holder)
    assert str(found) == "process 1 on elsewhere"
    claim.release()
    assert world.leases() == []
    assert world.take(second) is not None


def test_a_lease_that_stays_unchanged_for_the_observers_own_time_is_taken_over(world: World) -> None:
    clock = Clock()
    claim, second = world.take(world.driver()), world.driver(clock)
    assert claim is not None
    assert world.take(second) is None
    clock.now += 14.9
    assert world.take(second) is None
    clock.now += 0.1
    assert world.take(second) is not None
    assert len(world.leases()) == 1


def test_a_renewed_lease_is_never_taken_over_whatever_the_clocks_say(world: World) -> None:
    clock = Clock()
    claim, second = world.take(world.driver()), world.driver(clock)
    assert claim is not None
    (key,) = world.leases()
    for renewals in range(1, 5):
        assert world.take(second) is None
        clock.now += 14.9
        world.store.write(key, lease_content(ELSEWHERE, renewals))
    assert world.take(second) is None


def test_a_driver_that_was_away_notices_that_its_lease_is_lost(world: World) -> None:
    clock = Clock()
    slow = world.take(world.driver(renewal=0.2))
    assert slow is not None
    world.store.delete(f"{FOLDER}/{DIGEST}")  # what a taker does with older leases
    assert world.take(world.driver(clock, holder=Holder("third boot 1", 7, 0.0))) is not None
    wait_until(lambda: slow.is_lost)
    slow.release()
    assert len(world.leases()) == 1


def test_the_lease_of_a_process_that_died_here_is_taken_over_at_once(world: World) -> None:
    here = Holder.of_this_process()
    assert not here.is_known_to_be_dead()
    gone = Holder(here.host, here.pid, here.created - 1000.0)  # the same id, of an earlier process
    assert world.take(world.driver(holder=gone)) is not None
    assert world.take(world.driver()) is not None


def test_of_drivers_that_see_an_expired_lease_together_one_takes_it(world: World) -> None:
    clocks = [Clock() for _ in range(4)]
    drivers = [world.driver(clock) for clock in clocks]
    assert world.take(world.driver()) is not None
    assert [world.take(driver) for driver in drivers] == [None] * 4
    for clock in clocks:
        clock.now += 15.0
    winners: list[Claim | None] = []
    threads = [threading.Thread(target=lambda driver=driver: winners.append(world.take(driver))) for driver in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(winner is not None for winner in winners) == 1


def test_two_holders_never_work_at_once(world: World, tmp_path: Path) -> None:
    """Four threads contend for one digest; the holder checks that it is alone."""
    local = world.store.local_path(FOLDER)
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        holder = Holder(f"host{number} boot 1", number, 0.0)
        lease = LeaseClaims(world.store, holder, look_seconds=0.0)
        claims = Claims(world.store, lease if local is None else FileClaims(local, holder))
        for _ in range(3):
            wait_until(lambda: claims.take(DIGEST) is None)
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.005)
            inside.remove(number)
            claims.release(DIGEST)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 12


# -- drivers -----------------------------------------------------------------------------------------------------------


def stages() -> list[dict[str, object]]:
    return [
        data_stage("corpus"),
        tokenizer_stage("words", "corpus"),
        pretrain_stage("base", "words", "corpus"),
        export_stage("release", "base"),
    ]


def bench_in(folder: Path, script: dict[str, object]) -> Bench:
    folder.mkdir()
    bench = Bench(folder)
    bench.write(stages(), script, storage={"uri": str(folder.parent / "store")})
    return bench


def test_two_drivers_in_two_folders_share_the_work(tmp_path: Path) -> None:
    """Both trained every stage."""
    benches = [bench_in(tmp_path / name, {"base": {"seconds": 0.5}}) for name in ("one", "two")]
    views = [Recorder(), Recorder()]
    outcomes: list[Outcome] = []

    drivers = [Driver(bench.job(), view) for bench, view in zip(benches, views, strict=True)]
    threads = [threading.Thread(target=lambda driver=driver: outcomes.append(driver.run())) for driver in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.decision.state for outcome in outcomes] == [RunState.COMPLETE] * 2
    assert sorted(benches[0].started() + benches[1].started()) == ["base", "corpus", "release", "words"]
    waits = {row.view.waiting_for for view in views for shown in view.snapshots for row in shown.rows}
    assert any("which makes the same artifact in this storage" in text for text in waits)
    assert not list((tmp_path / "store" / FOLDER).iterdir())


def test_the_work_of_a_killed_driver_is_taken_over_once_its_stage_has_stopped(tmp_path: Path) -> None:
    first = bench_in(tmp_path / "one", {"base": {"seconds": 60}})
    second = bench_in(tmp_path / "two", {})
    process = first.stagecoach("run", "run.yaml")
    first.wait_for_event("start")
    wait_until(lambda: "base" in first.started())
    outcomes: list[Outcome] = []
    view = Recorder()
    thread = threading.Thread(target=lambda: outcomes.append(Driver(second.job(), view).run()))
    thread.start()
    wait_until(lambda: any("makes the same" in row.view.waiting_for for shown in view.snapshots for row in shown.rows))
    os.kill(process.pid, signal.SIGKILL)
    killed = time.monotonic()
    process.communicate()
    thread.join()
    assert time.monotonic() - killed < 10
    assert outcomes[0].decision.state is RunState.COMPLETE
    assert second.started() == ["base", "release"]
    stopped = [event["time"] for event in first.events("end") if event["stage"] == "base"]
    assert stopped[0] <= second.events("start")[0]["time"]
