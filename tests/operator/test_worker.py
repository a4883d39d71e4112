"""Turns of runs: merged while one is under way, repeated when due, slowed down when they fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest

from stagecoach_operator import worker
from stagecoach_operator.kube import Conflict, Unavailable
from stagecoach_operator.worker import Workers


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))  # type: ignore[arg-type]


def test_wishes_during_a_turn_make_one_more() -> None:
    turns: list[str] = []

    async def scenario() -> None:
        gate = asyncio.Event()

        async def turn(uid: str) -> None:
            turns.append(uid)
            await gate.wait()

        workers = Workers(turn)
        for _ in range(5):
            workers.wake("a")
        await asyncio.sleep(0.01)
        for _ in range(5):
            workers.wake("a")
        gate.set()
        await asyncio.sleep(0.05)
        assert turns == ["a", "a"]
        assert workers.slots == {}

    run(scenario)


def test_turns_of_one_run_never_overlap_and_those_of_others_do() -> None:
    async def scenario() -> None:
        now: dict[str, int] = {}
        seen: list[tuple[str, int]] = []
        together: list[int] = []

        async def turn(uid: str) -> None:
            now[uid] = now.get(uid, 0) + 1
            seen.append((uid, now[uid]))
            together.append(sum(now.values()))
            await asyncio.sleep(0.01)
            now[uid] -= 1

        workers = Workers(turn)
        for _ in range(10):
            workers.wake("a")
            workers.wake("b")
            await asyncio.sleep(0.003)
        await asyncio.sleep(0.05)
        assert max(count for _, count in seen) == 1
        assert max(together) == 2

    run(scenario)


def test_a_turn_is_taken_again_when_it_is_due() -> None:
    async def scenario() -> None:
        turns: list[float] = []

        async def turn(uid: str) -> float | None:
            turns.append(time.time())
            return time.time() + 0.05 if len(turns) < 3 else None

        Workers(turn).wake("a")
        await asyncio.sleep(0.3)
        assert len(turns) == 3
        assert all(later - earlier >= 0.045 for earlier, later in pairwise(turns))

    run(scenario)


@pytest.mark.parametrize("error", [Conflict("changed"), Unavailable("500"), RuntimeError("a bug")])
def test_a_failed_turn_is_taken_again_ever_later(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FIRST_PAUSE_SECONDS", 0.02)

    async def scenario() -> None:
        turns: list[float] = []

        async def turn(uid: str) -> float | None:
            turns.append(time.monotonic())
            if len(turns) < 5:
                raise error
            return None

        workers = Workers(turn)
        workers.wake("a")
        while len(turns) < 5:
            workers.wake("a")  # events keep coming: they must not storm the API server
            await asyncio.sleep(0.01)
        pauses = [later - earlier for earlier, later in pairwise(turns[:5])]
        least = (0.02, 0.04, 0.08, 0.16)
        assert all(pause > wanted - 0.001 for pause, wanted in zip(pauses, least, strict=True)), pauses

    run(scenario)


def test_a_server_that_says_when_to_come_back_is_obeyed() -> None:
    async def scenario() -> None:
        turns: list[float] = []

        async def turn(uid: str) -> float | None:
            turns.append(time.monotonic())
            if len(turns) == 1:
                raise Unavailable("429", retry_after=0.4)
            return None

        Workers(turn).wake("a")
        await asyncio.sleep(0.7)
        assert turns[1] - turns[0] >= 0.4

    run(scenario)


def test_closing_lets_turns_end_and_starts_no_more() -> None:
    async def scenario() -> None:
        ended: list[str] = []

        async def turn(uid: str) -> float | None:
            await asyncio.sleep(0.05)
            ended.append(uid)
            return time.time()

        workers = Workers(turn)
        workers.wake("a")
        await asyncio.sleep(0.01)
        await workers.close(5)
        workers.wake("b")
        await asyncio.sleep(0.1)
        assert ended == ["a"]
        assert workers.oldest_turn_seconds() == 0.0

    run(scenario)
