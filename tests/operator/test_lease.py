"""Leader election: acquiring, renewing, losing and releasing the Lease."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stagecoach_operator.kube import LEASES, Unavailable
from stagecoach_operator.lease import Lease
from tests.operator.makers import World


class Time:
    """A clock that advances by sleeping, and ends the scenario after a given time."""

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


def test_a_second_replica_waits_until_the_lease_has_expired(world: World) -> None:
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


def test_a_renewed_lease_is_never_taken(world: World) -> None:
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


def test_a_restarted_container_takes_its_lease_back_at_once(world: World) -> None:
    time = Time()
    asyncio.run(lease(world, "one", time).acquire())
    asyncio.run(lease(world, "one", time).acquire())
    assert time.now == 0


def test_a_released_lease_is_taken_at_once(world: World) -> None:
    time = Time()

    async def scenario() -> None:
        first = lease(world, "one", time)
        await first.acquire()
        await first.release()
        await lease(world, "two", time).acquire()

    asyncio.run(scenario())
    assert time.now == 0


def test_a_replica_that_cannot_renew_stops_before_another_may_start(world: World) -> None:
    time = Time()

    def fail(number: int, what: str) -> None:
        if what.startswith("replace leases"):
            raise Unavailable("connection refused")

    async def scenario() -> float:
        first = lease(world, "one", time)
        await first.acquire()
        world.api.before_write = fail
        await first.keep()
        assert not first.held
        return time.now

    assert asyncio.run(scenario()) < 15


def test_another_holder_means_the_lease_is_lost(world: World) -> None:
    time = Time()

    async def scenario() -> None:
        first = lease(world, "one", time)
        await first.acquire()
        world.api.edit(LEASES, "system", "operator", spec={"holderIdentity": "two"})
        await first.keep()
        assert not first.held

    asyncio.run(scenario())


def test_a_conflict_with_our_own_renewal_loses_nothing(world: World) -> None:
    time = Time(end=60.0)

    async def scenario() -> None:
        first = lease(world, "one", time)
        await first.acquire()
        world.api.edit(LEASES, "system", "operator", spec={"renewTime": "later"})
        with pytest.raises(TimeoutError):
            await first.keep()
        assert first.held

    asyncio.run(scenario())


def test_only_one_of_two_replicas_acquires_it(world: World) -> None:
    time = Time(end=10.0)

    async def scenario() -> None:
        both = [lease(world, name, time) for name in ("one", "two")]
        tasks = [asyncio.create_task(item.acquire()) for item in both]
        with pytest.raises(TimeoutError):
            await asyncio.gather(*tasks)
        assert [item.held for item in both].count(True) == 1

    asyncio.run(scenario())
