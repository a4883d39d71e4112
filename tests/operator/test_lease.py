"""One active operator: taking the Lease, keeping it, losing it, giving it up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stagecoach_operator.kube import LEASES, Unavailable
from stagecoach_operator.lease import Lease
from tests.operator.makers import World


class Time:
    """A clock that goes on by sleeping, and stops the scenario when it has slept enough."""

    def __init__(self, end: float = 100.0) -> None:
        self.now, self.end = 0.0, end

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)
        if self.now > self.end:
            raise TimeoutError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def lease(world: World, identity: str, time: Time) -> Lease:
    return Lease(world.api, "system", "operator", identity, 15, clock=time, sleep=time.sleep)


def holder(world: World) -> str:
    return str(world.api.objects[LEASES.plural, "system", "operator"]["spec"]["holderIdentity"])


def test_the_first_takes_it_and_a_second_waits_until_it_has_run_out(world: World) -> None:
    time = Time()

    async def scenario() -> None:
        await lease(world, "one", time).acquire()
        assert holder(world) == "one"
        second = lease(world, "two", time)
        await second.acquire()
        assert second.held

    asyncio.run(scenario())
    assert holder(world) == "two"
    assert time.now > 15
    spec = world.api.objects[LEASES.plural, "system", "operator"]["spec"]
    assert spec["leaseTransitions"] == 2


def test_a_lease_that_is_renewed_is_never_taken(world: World) -> None:
    time = Time(end=200.0)

    async def scenario() -> None:
        first, second = lease(world, "one", time), lease(world, "two", time)
        await first.acquire()
        keeping = asyncio.create_task(first.keep())
        with pytest.raises(TimeoutError):
            await second.acquire()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        assert not second.held

    asyncio.run(scenario())
    assert holder(world) == "one"


def test_a_restarted_container_takes_its_own_back_at_once(world: World) -> None:
    time = Time()
    asyncio.run(lease(world, "one", time).acquire())
    asyncio.run(lease(world, "one", time).acquire())
    assert time.now == 0


def test_who_gives_it_up_does_not_keep_others_waiting(world: World) -> None:
    time = Time()

    async def scenario() -> None:
        first = lease(world, "one", time)
        await first.acquire()
        await first.release()
        await lease(world, "two", time).acquire()

    asyncio.run(scenario())
    assert time.now == 0


def test_who_cannot_renew_it_stops_before_others_may_start(world: World) -> None:
    time = Time()

    def away(number: int, what: str) -> None:
        if what.startswith("replace leases"):
            raise Unavailable("connection refused")

    async def scenario() -> float:
        first = lease(world, "one", time)
        await first.acquire()
        world.api.before_write = away
        await first.keep()
        assert not first.held
        return time.now

    assert asyncio.run(scenario()) < 15


def test_who_finds_another_holder_has_lost_it(world: World) -> None:
    time = Time()

    async def scenario() -> None:
        first = lease(world, "one", time)
        await first.acquire()
        world.api.edit(LEASES, "system", "operator", spec={"holderIdentity": "two"})
        await first.keep()
        assert not first.held

    asyncio.run(scenario())


def test_a_conflict_that_is_our_own_lost_answer_loses_nothing(world: World) -> None:
    time = Time(end=60.0)

    async def scenario() -> None:
        first = lease(world, "one", time)
        await first.acquire()
        world.api.edit(LEASES, "system", "operator", spec={"renewTime": "later"})
        with pytest.raises(TimeoutError):
            await first.keep()
        assert first.held

    asyncio.run(scenario())


def test_two_at_once_cannot_both_have_it(world: World) -> None:
    time = Time(end=10.0)

    async def scenario() -> None:
        both = [lease(world, name, time) for name in ("one", "two")]
        tasks = [asyncio.create_task(item.acquire()) for item in both]
        with pytest.raises(TimeoutError):
            await asyncio.gather(*tasks)
        assert [item.held for item in both].count(True) == 1

    asyncio.run(scenario())
