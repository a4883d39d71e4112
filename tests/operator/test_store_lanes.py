"""Stores that do not answer: they hold up no run of another store, and are asked less and less often."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.spec import Storage
from stagecoach_api.status import ConditionStatus, ConditionType, Reason
from stagecoach_api.store import NotFound, Unreachable
from stagecoach_operator.kube import TRAINING_RUNS
from stagecoach_operator.storage_access import AllowedStorage
from stagecoach_operator.store_lanes import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Lane, Paused, StoreLanes
from stagecoach_operator.worker import Workers
from tests.operator.makers import Operator, World, data_stage

BAD_RUNS = 24


class Listener:
    """A server on 127.0.0.1 that accepts connections, keeps what it is sent, and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.heard: list[bytes] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._open.append(connection)
                threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        with suppress(OSError):
            self.heard.append(connection.recv(65536))

    def close(self) -> None:
        for item in (self._socket, *self._open):
            with suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
            item.close()


@pytest.fixture
def black_hole(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-operator")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-operator")
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    return made


def submit_bad(world: World, endpoint: str, count: int) -> None:
    storage = {"endpoint": endpoint, "inputs": "s3://bucket/in"}
    for number in range(count):
        name = f"bad-{number}"
        world.submit(
            data_stage("a", uri="s3://bucket/in.txt"), name=name, storage={**storage, "uri": f"s3://bucket/{name}"}
        )


def conditions(world: World, name: str) -> dict[ConditionType, tuple[ConditionStatus, str]]:
    return {item.type: (item.status, item.message) for item in world.status(name).conditions}


def test_runs_of_a_store_that_does_not_answer_hold_up_no_other_run(world: World, black_hole: Listener) -> None:
    """24 runs name an endpoint that accepts and never answers; a run of another store is accepted within 2 s."""
    allowed = AllowedStorage(endpoint=black_hole.endpoint, buckets=("bucket",))
    world.settings = world.settings.model_copy(update={"allowed_storage": (allowed,)})
    world.clock = time.time  # type: ignore[method-assign]
    world.api.clock = time.time

    async def scenario() -> float:
        operator = Operator(world)
        workers = Workers(operator.reconciler.reconcile)
        # As in the application: events and finished plans enqueue into the workers.
        operator.planner.enqueue = operator.reconciler.enqueue = workers.enqueue
        operator.enqueue = workers.enqueue  # type: ignore[method-assign]
        submit_bad(world, black_hole.endpoint, BAD_RUNS)
        while not black_hole.heard:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        world.submit(data_stage("a"), name="good")
        while ConditionType.ACCEPTED not in conditions(world, "good"):
            await asyncio.sleep(0.01)
            assert time.monotonic() - began < 10
        seconds = time.monotonic() - began
        assert workers.longest_running_seconds() < 1.0, "no turn waits for S3"
        await workers.close(1.0)
        operator.die()
        return seconds

    assert asyncio.run(scenario()) < 2.0
    assert conditions(world, "good")[ConditionType.ACCEPTED][0] is ConditionStatus.TRUE


def test_a_store_that_is_not_allowed_receives_nothing(world: World, black_hole: Listener) -> None:
    """The operator's identity signs only for endpoints and buckets that its settings name."""
    submit_bad(world, black_hole.endpoint, 1)

    async def scenario() -> None:
        operator = Operator(world)
        await operator.settle()
        operator.die()

    asyncio.run(scenario())
    accepted = world.condition(ConditionType.ACCEPTED, "bad-0")
    assert (accepted.status, accepted.reason) == (ConditionStatus.FALSE, Reason.STORAGE_NOT_ALLOWED)
    assert "storage.allowed" in accepted.message
    assert "is not encrypted" in accepted.message
    assert black_hole.heard == []
    assert world.pods_made == []


def test_a_store_that_is_no_longer_allowed_receives_nothing_for_runs_under_way(
    world: World, black_hole: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(uri="s3://bucket/x", endpoint=black_hole.endpoint)

    async def scenario() -> None:
        operator = Operator(world)
        answered: list[str] = []
        assert operator.lookups.ask(storage, "d" * 64, lambda: answered.append("yes")) is None
        while not answered:
            await asyncio.sleep(0.001)
        state = operator.lookups.of(storage)
        assert state.unreadable, "the stage's own pod looks for the artifact instead"
        operator.die()

    asyncio.run(scenario())
    assert black_hole.heard == []


# -- one lane ----------------------------------------------------------------------------------------------------------


def failing() -> None:
    raise Unreachable("key", "cannot be reached")


def absent() -> None:
    raise NotFound("key", "is not there")


def test_pauses_of_an_endpoint_without_answers_grow_from_seconds_to_minutes() -> None:
    now = [1000.0]
    lane = Lane("https://s3.example.com", 2, clock=lambda: now[0])
    pauses = []

    async def scenario() -> None:
        for _ in range(8):
            with pytest.raises(Unreachable):
                await lane.run(failing)
            pauses.append(lane.not_before - now[0])
            with pytest.raises(Paused, match="cannot be reached"):
                await lane.run(failing)
            now[0] = lane.not_before
        with pytest.raises(NotFound):
            await lane.run(absent)
        assert (lane.failures, lane.error) == (0, ""), "an answer ends it, even one that there is nothing"

    asyncio.run(scenario())
    assert pauses[0] == FIRST_PAUSE_SECONDS
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


def test_a_call_that_takes_too_long_keeps_its_thread_but_nobody_waiting() -> None:
    go_on = threading.Event()
    lane = Lane("https://s3.example.com", 1)

    async def scenario() -> None:
        with pytest.raises(Unreachable, match="has not answered"):
            await lane.run(go_on.wait, 0.01)
        assert lane.running == 1
        go_on.set()
        while lane.running:
            await asyncio.sleep(0.001)
        assert lane.is_paused

    asyncio.run(scenario())


@given(st.lists(st.sampled_from([failing, absent, None]), max_size=12), st.integers(1, 3))
def test_a_lane_gives_back_every_slot_whatever_its_calls_do(
    works: list[Callable[[], None] | None], threads: int
) -> None:
    lane = Lane("https://s3.example.com", threads, clock=lambda: 0.0)

    async def scenario() -> None:
        done = await asyncio.gather(*(lane.run(work or (lambda: None)) for work in works), return_exceptions=True)
        assert all(isinstance(item, Unreachable | NotFound | None) for item in done)
        await asyncio.sleep(0)
        assert (lane.running, lane.waiting) == (0, 0)
        assert not lane._slots.locked()

    asyncio.run(scenario())


def test_a_region_that_does_not_exist_pauses_no_other_region(world: World) -> None:
    lanes = StoreLanes(world.settings)
    storage = Storage(uri="s3://bucket/x")
    wrong = storage.model_copy(update={"region": "no-where-1"})
    assert lanes.of_endpoint(storage) is not lanes.of_endpoint(wrong)
    assert lanes.of_endpoint(storage) is lanes.of_endpoint(Storage(uri="s3://other/x"))


def test_an_edit_of_the_storage_is_refused_while_stages_have_run_in_the_old_one(world: World) -> None:
    """The status never names an artifact in a store where it is not."""
    (world.folder / "other").mkdir()
    world.holds.add("b")
    world.submit(data_stage("a"), data_stage("b", "a"))

    async def scenario() -> None:
        operator = Operator(world)
        await operator.settle()
        for _ in range(30):
            world.tick()
            world.now += 1
            await operator.settle()
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"storage": {"uri": f"file://{world.folder}/other"}})
        await operator.settle()
        operator.die()

    asyncio.run(scenario())
    planned = world.condition(ConditionType.ACCEPTED)
    assert planned.status is ConditionStatus.FALSE
    assert "cannot be changed once stages have run" in planned.message
    artifact = world.stage("a").artifact
    assert artifact is not None
    assert Path(artifact.uri.removeprefix("file://")).parent.is_dir()
    assert world.stage("b").attempt == 1, "the attempt in the old storage continues"
