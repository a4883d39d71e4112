"""What silence means: a hang of one attempt, or reports that do not arrive."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.status import ConditionType, StageState
from stagecoach_operator.attempt_times import moment
from stagecoach_operator.heartbeats import RECORD_SECONDS, heartbeat_of, with_report
from stagecoach_operator.kube import PODS
from stagecoach_operator.progress_reports import DEAF_SECONDS, Hearing, LatestReport, ProgressReport, ProgressReports
from stagecoach_operator.self_check import is_reached
from tests.operator.makers import START, Operator, World, data_stage, drive
from tests.operator.test_observe import record

SILENCE = 600.0
FIRST = 1800.0
HOUR = 3600.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    made.settings = made.settings.model_copy(update={"progress_url": "https://operator"})
    return made


async def wait(world: World, operator: Operator, seconds: float) -> None:
    """Let time pass, also if nothing happens in it."""
    end = world.now + seconds
    await drive(world, operator, seconds)
    world.now = max(world.now, end)
    await operator.settle()


def report(operator: Operator, world: World, run: str = "demo", stage: str = "a") -> None:
    """Report as the newest attempt of a stage."""
    uid, number = world.run(run).meta.uid, world.stage(stage, run).attempt
    key = (uid, stage, number)
    operator.reconciler.reports.record(key, ProgressReport(pod_uid=f"pod-{number}", time=world.now, activity="train"))
    operator.enqueue(uid)


def test_a_hang_is_found_by_the_next_leader(world: World) -> None:
    """The newest report outlives the operator process that received it."""
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await wait(world, operator, 20)
        for _ in range(10):
            report(operator, world)
            await wait(world, operator, 20)
        operator.die()
        heard = world.stage("a").attempts[0].last_report
        assert heard is not None
        assert world.now - heard.timestamp() < 2 * RECORD_SECONDS
        world.now += HOUR
        operator = Operator(world)
        operator.enqueue(world.run().meta.uid)
        await wait(world, operator, SILENCE - 10)
        assert world.stage("a").attempt == 1, "silence counts from the start of the process that listens"
        await wait(world, operator, 120)
        assert world.stage("a").attempt == 2
        operator.die()

    asyncio.run(scenario())
    assert world.stage("a").restarts.hang == 1


def test_an_attempt_that_goes_on_reporting_is_not_touched_by_the_next_leader(world: World) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await wait(world, operator, 20)
        report(operator, world)
        await wait(world, operator, 60)
        operator.die()
        operator = Operator(world)
        operator.enqueue(world.run().meta.uid)
        for _ in range(6):
            await wait(world, operator, 300)
            report(operator, world)
        await wait(world, operator, 60)
        operator.die()

    asyncio.run(scenario())
    assert world.stage("a").attempt == 1


@pytest.mark.parametrize("leaders", [1, 2])
def test_a_hang_before_the_first_report_is_found(world: World, leaders: int) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await wait(world, operator, 20)
        if leaders == 2:
            operator.die()
            world.now += HOUR
            operator = Operator(world)
            operator.enqueue(world.run().meta.uid)
        await wait(world, operator, FIRST - 60)
        assert world.stage("a").attempt == 1
        await wait(world, operator, 120)
        assert world.stage("a").attempt == 2
        operator.die()

    asyncio.run(scenario())
    assert "before the first one" in world.stage("a").attempts[0].message


def test_nothing_is_killed_while_no_attempt_is_heard(world: World) -> None:
    """The progress server is unreachable for an hour: every attempt that had reported would be killed as a hang."""
    world.holds |= {"a", "b"}
    world.submit(data_stage("a"))
    world.input("b.txt", "other\n")
    world.submit(data_stage("b", uri="b.txt"), name="other")

    async def scenario() -> Operator:
        operator = Operator(world)
        await wait(world, operator, 20)
        for _ in range(3):
            report(operator, world)
            report(operator, world, "other", "b")
            await wait(world, operator, 20)
        await wait(world, operator, HOUR)
        assert (world.stage("a").attempt, world.stage("b", "other").attempt) == (1, 1)
        assert "no attempt has been heard since" in world.condition(ConditionType.PROGRESSING).message
        world.now += 60
        report(operator, world, "other", "b")
        await wait(world, operator, 60)
        assert world.stage("a").attempt == 1, "it is heard again in a moment"
        # Only `b` reports from here on.
        for _ in range(4):
            await wait(world, operator, 200)
            report(operator, world, "other", "b")
        await wait(world, operator, 60)
        assert (world.stage("a").attempt, world.stage("b", "other").attempt) == (2, 1)
        assert "heard" not in world.condition(ConditionType.PROGRESSING).message
        operator.die()
        return operator

    operator = asyncio.run(scenario())
    assert {event.reason for event in operator.events if "been heard since" in event.message} == {"Unheard"}


def test_the_next_leader_knows_who_reported_before(world: World) -> None:
    """Two attempts that reported to its predecessor, and none of them to it: the new leader is not reached."""
    world.holds |= {"a", "b"}
    world.submit(data_stage("a"))
    world.input("b.txt", "other\n")
    world.submit(data_stage("b", uri="b.txt"), name="other")

    async def scenario() -> None:
        operator = Operator(world)
        await wait(world, operator, 20)
        report(operator, world)
        report(operator, world, "other", "b")
        await wait(world, operator, 60)
        operator.die()
        operator = Operator(world)
        for name in ("demo", "other"):
            operator.enqueue(world.run(name).meta.uid)
        await wait(world, operator, 2 * HOUR)
        operator.die()

    asyncio.run(scenario())
    assert (world.stage("a").attempt, world.stage("b", "other").attempt) == (1, 1)


@pytest.mark.parametrize("reached", [True, False])
def test_a_single_silent_attempt_hangs_if_the_service_is_reached(world: World, reached: bool) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        reports = operator.reconciler.reports
        reports.start(world.now, checked=True)
        await wait(world, operator, 20)
        report(operator, world)
        for _ in range(12):
            if reached:
                reports.reached(world.now)
            await wait(world, operator, 60)
        assert world.stage("a").attempt == (2 if reached else 1)
        operator.die()

    asyncio.run(scenario())


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 400)), min_size=1, max_size=30), st.floats(0, 4000))
def test_no_attempt_is_silent_for_long_unless_another_is_heard(beats: list[tuple[str, float]], rest: float) -> None:
    """For any order and pauses of reports of two attempts: a silence beyond the limit counts only if the other reported
    during it."""
    reports, now, heard = ProgressReports(since=START), START, dict.fromkeys("ab", START)
    for name, pause in beats:
        now += pause
        reports.record(("run", name, 1), ProgressReport(pod_uid=name, time=now))
        heard[name] = now
    reports.expect(("run", "a", 1))
    reports.expect(("run", "b", 1))
    now += rest
    hearing = Hearing(reports.since, reports.deaf(now), expected=True)
    for name, other in (("a", "b"), ("b", "a")):
        latest = reports.latest(("run", name, 1))
        beat = heartbeat_of(record(), latest, hearing, now)
        silence = now - max(beat.time or START, beat.listening_since)
        if silence > SILENCE:
            assert heard[other] > now - DEAF_SECONDS
            assert heard[name] <= now - SILENCE


def test_the_record_has_a_report_of_the_last_minute() -> None:
    first = with_report(record(), LatestReport(ProgressReport("p", START), 12.7))
    assert (first.last_report, first.longest_silence_seconds) == (moment(START), 12)
    assert with_report(first, LatestReport(ProgressReport("p", START + RECORD_SECONDS - 1), 40.0)) is first
    later = with_report(first, LatestReport(ProgressReport("p", START + RECORD_SECONDS), 3.0))
    assert (later.last_report, later.longest_silence_seconds) == (moment(START + RECORD_SECONDS), 12)


def test_reports_alone_are_written_once_in_ten_seconds(world: World) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await wait(world, operator, 20)
        world.api.writes.clear()
        for _ in range(300):
            report(operator, world)
            await operator.settle()
            world.now += 1.0
        operator.die()

    asyncio.run(scenario())
    assert len(world.api.writes) <= 300 / 10 + 1


# -- the call to the own Service ---------------------------------------------------------------------------------------


class Replicas:
    """A Service with an active and a standby replica, which answer in turn."""

    def __init__(self, *statuses: int) -> None:
        self._answers: Iterator[int] = iter(statuses * 10)
        self.app = web.Application()
        self.app.router.add_post("/{path:.*}", self.answer)

    async def answer(self, request: web.Request) -> web.Response:
        assert request.headers.get("Authorization") is None
        return web.Response(status=next(self._answers))


@pytest.mark.parametrize(("statuses", "reached"), [((401,), True), ((503, 503, 401), True), ((503,), False)])
def test_the_active_replica_is_found_behind_its_service(statuses: tuple[int, ...], reached: bool) -> None:
    async def scenario() -> bool:
        async with TestServer(Replicas(*statuses).app) as server:
            return await is_reached(str(server.make_url("/")), None)

    assert asyncio.run(scenario()) is reached


def test_a_service_without_an_answer_is_not_reached() -> None:
    assert not asyncio.run(is_reached("http://127.0.0.1:1", None))


def test_a_certificate_that_does_not_fit_is_an_error_of_the_settings() -> None:
    with pytest.raises(ssl.SSLError):
        asyncio.run(is_reached("https://127.0.0.1:1", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))


def test_pods_that_run_and_report_make_a_stage_that_runs(world: World) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await wait(world, operator, 20)
        report(operator, world)
        await wait(world, operator, 20)
        operator.die()

    asyncio.run(scenario())
    assert (world.stage("a").state, len(world.api.all_of(PODS))) == (StageState.RUNNING, 1)
