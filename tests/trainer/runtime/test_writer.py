"""One attempt at a time makes an artifact: rules of waiting, and a model of attempts interleaved and killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.artifacts import Manifest, ResolvedStage, manifest_key, writer_key
from stagecoach_api.outcomes import Cause
from stagecoach_api.store import Store, open_store
from stagecoach_api.writer_record import LEASE_SECONDS
from stagecoach_api.writers import read_lease, renew, take
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.failures import outcome_of
from stagecoach_trainer.runtime.publish import publish
from stagecoach_trainer.runtime.writer import TakenOver, Writer
from tests.trainer.contexts import resolved_stage, stage_context

DIGEST = "d" * 64


def work(folder: Path, uid: str, number: int = 1) -> ResolvedStage:
    return resolved_stage(folder, run=f"run-{uid}", run_uid=uid, attempt=number)


def writer(store: Store, stage: ResolvedStage, wait: Callable[[float], bool] | None = None) -> Writer:
    return Writer(store, stage, threading.Event(), wait)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def expire(folder: Path, _: float = 0.0) -> bool:
    """Make the lease, if there is one, look as if it had not been renewed for long."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(folder / writer_key(DIGEST), (time.time() - LEASE_SECONDS - 9,) * 2)
    return False


def test_an_attempt_that_lost_the_right_stops_and_is_not_charged(store: Store, tmp_path: Path) -> None:
    old = writer(store, work(tmp_path, "one", 1))
    assert old.acquire() is None
    old.check()
    newer = writer(store, work(tmp_path, "one", 2))
    newer.acquire()
    with pytest.raises(TakenOver, match=r"another attempt \(run default/run-one, attempt 2\)") as caught:
        old.check()
    assert outcome_of(caught.value).result.cause is Cause.PREEMPTION
    newer.check()
    old.release()
    newer.check()
    newer.release()


def test_an_attempt_gives_way_to_another_runs_that_is_alive(store: Store, tmp_path: Path) -> None:
    _, lease = take(store, work(tmp_path, "one"))

    def renewed_meanwhile(_: float) -> bool:
        return renew(store, DIGEST, lease) is None

    with pytest.raises(TakenOver, match="run default/run-one"):
        writer(store, work(tmp_path, "two"), renewed_meanwhile).acquire()


def test_an_attempt_takes_over_from_another_runs_that_is_not(store: Store, tmp_path: Path) -> None:
    take(store, work(tmp_path, "one"))
    second = writer(store, work(tmp_path, "two"), partial(expire, tmp_path))
    assert second.acquire() is None
    second.release()
    lease = read_lease(store, DIGEST)
    assert lease is not None
    assert (lease.record.epoch, lease.record.released) == (2, True)


# -- a model: attempts of several runs, interleaved at every call to the store and killed at any -----------------------


class Killed(BaseException):
    """The process is gone."""


@dataclass
class Turns:
    """Lets one thread at a time make one call to the store, in an order that a test chooses."""

    change: threading.Condition = field(default_factory=threading.Condition)
    waiting: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    granted: tuple[int, str] | None = None

    def call(self, me: int, operation: Callable[[], Any]) -> Any:
        with self.change:
            self.waiting.add(me)
            self.change.notify_all()
            self.change.wait_for(lambda: self.granted is not None and self.granted[0] == me)
            assert self.granted is not None
            how, self.granted = self.granted[1], None
            self.waiting.discard(me)
            if how == "kill before":
                raise Killed
            result = operation()
            if how == "kill after":
                raise Killed
            return result

    def end(self, me: int) -> None:
        with self.change:
            self.ended.add(me)
            self.change.notify_all()

    def grant(self, me: int, how: str) -> None:
        with self.change:
            self.granted = me, how
            self.change.notify_all()

    def settle(self, attempts: int) -> list[int]:
        """Wait until every attempt waits for its turn or has ended; return those that wait."""
        with self.change:
            self.change.wait_for(
                lambda: self.granted is None and len(self.waiting | self.ended) == attempts, timeout=20
            )
            return sorted(self.waiting - self.ended)


class TurnedStore:
    """A store whose calls each wait for their turn."""

    def __init__(self, store: Store, turns: Turns, me: int) -> None:
        self._store, self._turns, self._me = store, turns, me

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("exists", "read", "write", "commit", "read_stamped", "replace", "upload", "delete"):
            return found
        return lambda *arguments: self._turns.call(self._me, lambda: found(*arguments))


def attempt_in(context: StageContext, turns: Turns, me: int, failures: list[BaseException], fenced: bool) -> None:
    own = Writer(context.store, context.resolved, context.stop, lambda _: False)
    try:
        if not fenced:
            publish(context, StageOutcome(), time.time())
        elif own.acquire() is None:
            publish(replace(context, writer=own), StageOutcome(), time.time())
        own.release()
    except (Killed, TakenOver):
        own._ended.set()
    except BaseException as error:
        own._ended.set()
        failures.append(error)
    finally:
        turns.end(me)


@dataclass
class Scene:
    """Three attempts, two of one run, at one digest with different content, in threads."""

    folder: Path
    fenced: bool
    """Whether they take the right to write. Publishing alone must keep the promise too."""
    turns: Turns = field(default_factory=Turns)
    failures: list[BaseException] = field(default_factory=list)

    def start(self) -> list[threading.Thread]:
        store = open_store(str(self.folder / "store"))
        threads = []
        for me, (uid, number) in enumerate((("one", 1), ("one", 2), ("two", 1))):
            stage = work(self.folder / "store", uid, number)
            here = stage_context(stage, self.folder / f"work-{me}", self.folder / "cache", store=store)
            (here.output / "weights").write_bytes(bytes([me]) * 9)
            context = replace(here, store=TurnedStore(store, self.turns, me))
            arguments = (context, self.turns, me, self.failures, self.fenced)
            threads.append(threading.Thread(target=attempt_in, args=arguments, daemon=True))
            threads[-1].start()
        return threads

    def manifest(self) -> Manifest | None:
        path = self.folder / "store" / manifest_key(DIGEST)
        return Manifest.model_validate_json(path.read_bytes()) if path.exists() else None

    def is_whole(self, manifest: Manifest) -> bool:
        files = [(self.folder / "store" / manifest.folder / item.path, item.sha256) for item in manifest.objects]
        return all(path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha for path, sha in files)


def choices(data: st.DataObject) -> Iterator[tuple[int, str]]:
    for _ in range(40):
        kind = data.draw(st.sampled_from(["go"] * 12 + ["kill before", "kill after", "expire"]))
        yield data.draw(st.integers(0, 2)), kind
    while True:
        yield 0, "go"


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_whatever_is_interleaved_and_killed_one_manifest_is_made_and_its_files_match_it(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        scene = Scene(Path(folder), data.draw(st.booleans()))
        threads = scene.start()
        first: Manifest | None = None
        for turn, (choice, how) in enumerate(choices(data)):
            ready = scene.turns.settle(len(threads))
            if not ready or turn > 400:
                break
            if how == "expire" or turn % 60 == 59:  # the holder is not heard of for long
                expire(scene.folder / "store")
            scene.turns.grant(ready[choice % len(ready)], how.replace("expire", "go"))
            scene.turns.settle(len(threads))
            found = scene.manifest()
            first = first or found
            assert found == first, "a manifest was written twice"
            assert found is None or scene.is_whole(found)
        assert scene.failures == []
        for thread in threads:
            thread.join(5)
