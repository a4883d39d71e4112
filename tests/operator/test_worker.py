"""Reconciliations: merged while one is running, repeated when due, delayed after failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from stagecoach_operator import worker
from stagecoach_operator.kube import Conflict, Unavailable
from stagecoach_operator.worker import Workers


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_requests_during_a_reconciliation_cause_one_more() -> None:
    reconciled: list[str] = []

    async def scenario() -> None:
        gate = asyncio.Event()

        async def reconcile(uid: str) -> None:
            reconciled.append(uid)
            await gate.wait()

        workers = Workers(reconcile)
        for _ in range(5):
            workers.enqueue("a")
        await asyncio.sleep(0.01)
        for _ in range(5):
            workers.enqueue("a")
        gate.set()
        await asyncio.sleep(0.05)
        assert reconciled == ["a", "a"]
        assert workers.slots == {}

    run(scenario)


def test_only_reconciliations_of_different_runs_overlap() -> None:
    async def scenario() -> None:
        now: dict[str, int] = {}
        seen: list[tuple[str, int]] = []
        together: list[int] = []

        async def reconcile(uid: str) -> None:
            now[uid] = now.get(uid, 0) + 1
            seen.append((uid, now[uid]))
            together.append(sum(now.values()))
            await asyncio.sleep(0.01)
            now[uid] -= 1

        workers = Workers(reconcile)
        for _ in range(10):
            workers.enqueue("a")
            workers.enqueue("b")
            await asyncio.sleep(0.003)
        await asyncio.sleep(0.05)
        assert max(count for _, count in seen) == 1
        assert max(together) == 2

    run(scenario)


def test_a_reconciliation_is_repeated_when_due() -> None:
    async def scenario() -> None:
        times: list[float] = []

        async def reconcile(uid: str) -> float | None:
            times.append(time.time())
            return time.time() + 0.05 if len(times) < 3 else None

        Workers(reconcile).enqueue("a")
        await asyncio.sleep(0.3)
        assert len(times) == 3
        assert all(later - earlier >= 0.045 for earlier, later in pairwise(times))

    run(scenario)


@pytest.mark.parametrize("error", [Conflict("changed"), Unavailable("500"), RuntimeError("a bug")])
def test_failed_reconciliations_back_off(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FIRST_PAUSE_SECONDS", 0.02)

    async def scenario() -> None:
        times: list[float] = []

        async def reconcile(uid: str) -> float | None:
            times.append(time.monotonic())
            if len(times) < 5:
                raise error
            return None

        workers = Workers(reconcile)
        workers.enqueue("a")
        while len(times) < 5:
            workers.enqueue("a")  # events arriving meanwhile must not defeat the back-off
            await asyncio.sleep(0.01)
        pauses = [later - earlier for earlier, later in pairwise(times[:5])]
        least = (0.02, 0.04, 0.08, 0.16)
        assert all(pause > wanted - 0.001 for pause, wanted in zip(pauses, least, strict=True)), pauses

    run(scenario)


def test_retry_after_is_respected() -> None:
    async def scenario() -> None:
        times: list[float] = []

        async def reconcile(uid: str) -> float | None:
            times.append(time.monotonic())
            if len(times) == 1:
                raise Unavailable("429", retry_after=0.4)
            return None

        Workers(reconcile).enqueue("a")
        await asyncio.sleep(0.7)
        assert times[1] - times[0] >= 0.4

    run(scenario)


def test_closing_waits_for_running_reconciliations() -> None:
    async def scenario() -> None:
        ended: list[str] = []

        async def reconcile(uid: str) -> float | None:
            await asyncio.sleep(0.05)
            ended.append(uid)
            return time.time()

        workers = Workers(reconcile)
        workers.enqueue("a")
        await asyncio.sleep(0.01)
        await workers.close(5)
        workers.enqueue("b")
        await asyncio.sleep(0.1)
        assert ended == ["a"]
        assert workers.longest_running_seconds() == 0.0

    run(scenario)


def test_a_reconciliation_that_never_ends_gives_up_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TURN_SECONDS", 0.02)
    monkeypatch.setattr(worker, "FIRST_PAUSE_SECONDS", 0.01)
    turns: list[str] = []

    async def scenario() -> None:
        async def reconcile(uid: str) -> None:
            turns.append(uid)
            if len(turns) < 3:
                await asyncio.Event().wait()

        workers = Workers(reconcile)
        workers.enqueue("a")
        while workers.slots:
            await asyncio.sleep(0.01)

    run(scenario)
    assert turns == ["a"] * 3
