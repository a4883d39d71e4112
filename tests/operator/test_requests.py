"""Retries that a user asks for, and clocks that differ."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stagecoach_api.names import ANNOTATION_RETRY
from stagecoach_api.status import StageState
from stagecoach_operator.kube import TRAINING_RUNS
from stagecoach_operator.object_views import timestamp
from stagecoach_operator.requests import token_of
from tests.operator.makers import START, Ends, Operator, World, data_stage, drive

HOUR = 3600.0


def at(seconds: float, hours: int) -> str:
    """The time as `date -Iseconds` writes it in another zone."""
    return datetime.fromtimestamp(seconds, timezone(timedelta(hours=hours))).isoformat(timespec="seconds")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(at(START, 8), id="in Shanghai"),
        pytest.param(at(START, -7), id="in Denver"),
        pytest.param(at(START + 8 * HOUR, 0), id="in the future"),
        pytest.param("once more", id="a word"),
        pytest.param("x" * 5000, id="a long text"),
    ],
)
def test_a_retry_is_carried_out_once_whatever_time_it_names(tmp_path: Path, value: str) -> None:
    """A time zone was dropped: 140 attempts in 1.2 minutes, none charged, for eight hours; or none at all."""
    world = World(tmp_path)
    world.input("a.txt")
    world.ends["a"] = [Ends(64, "user", "bad data")] * 1000
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator)
        assert (world.stage("a").state, world.stage("a").attempt) == (StageState.FAILED, 1)
        world.api.edit(TRAINING_RUNS, "team", "demo", metadata={"annotations": {ANNOTATION_RETRY: value}})
        await drive(world, operator)
        operator.die()
        # Neither does another operator carry it out again, nor the same one after an unrelated change.
        operator = Operator(world)
        await drive(world, operator)
        world.api.edit(TRAINING_RUNS, "team", "demo", metadata={"annotations": {"stagecoach.dev/other": "x"}})
        await drive(world, operator)
        assert (world.stage("a").state, world.stage("a").attempt, world.stage("a").restarts.user) == (
            StageState.FAILED,
            2,
            1,
        )
        assert world.status().retry == token_of(value)
        world.api.edit(TRAINING_RUNS, "team", "demo", metadata={"annotations": {ANNOTATION_RETRY: "and again"}})
        world.ends.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert (world.stage("a").state, world.stage("a").attempt) == (StageState.SUCCEEDED, 3)


def test_times_are_converted_from_their_zone() -> None:
    assert timestamp("2027-01-15T16:00:00+08:00") == timestamp("2027-01-15T08:00:00Z") == START
    assert timestamp("2027-01-15T01:00:00.500000-07:00") == START + 0.5
    assert timestamp("2027-01-15T08:00:00") == START


def history(api: float, node: float, laptop: float, next_operator: float) -> list[object]:
    """A run's story, with clocks that are so many seconds ahead of the first operator's."""
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.input("a.txt")
        world.api.clock = lambda: world.now + api
        world.node_skew = node
        killed = Ends(1, "infrastructure", "peer closed the connection")
        world.ends["a"] = [killed, Ends(137, None, raw="Killed", reason="OOMKilled"), Ends(64, "user", "bad data")]
        world.waits["b"] = {"reason": "ImagePullBackOff", "message": "no such image"}
        world.submit(data_stage("a", resources={"nodes": 2}, timeoutSeconds=1000), data_stage("b", "a"))
        story: list[object] = []

        async def scenario() -> None:
            operator = Operator(world)
            await drive(world, operator, 600)
            story.append(round(world.now - START))
            operator.die()
            # The next operator's node has another clock, and the world's time goes by it.
            world.now += next_operator
            world.api.clock = lambda: world.now + api - next_operator
            world.node_skew = node - next_operator
            operator = Operator(world)
            retry = at(world.now - next_operator + laptop, 5)
            world.api.edit(TRAINING_RUNS, "team", "demo", metadata={"annotations": {ANNOTATION_RETRY: retry}})
            world.holds.add("a")
            await drive(world, operator, 900)
            story.append((world.stage("a").state, world.stage("a").attempt))
            world.holds.clear()
            await drive(world, operator, 2 * HOUR)
            operator.die()

        asyncio.run(scenario())
        for stage in world.status().stages:
            story.append((stage.name, stage.state, stage.attempt, stage.restarts, stage.message))
            story += [(item.number, item.cause, item.fault, item.message) for item in stage.attempts]
        return story


SKEW = st.floats(-HOUR, HOUR)
CALM: list[object] = []


@given(api=SKEW, node=SKEW, laptop=SKEW, next_operator=SKEW)
@settings(max_examples=4, deadline=None, phases=[Phase.generate])  # an example takes a second: no shrinking
def test_clocks_that_differ_by_an_hour_change_no_outcome(
    api: float, node: float, laptop: float, next_operator: float
) -> None:
    if not CALM:
        CALM.extend(history(0.0, 0.0, 0.0, 0.0))
    assert history(api, node, laptop, next_operator) == CALM
