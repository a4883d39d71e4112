"""The right to write to an artifact: taken once, renewed, taken over by rule, by the store's clock."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.artifacts import ResolvedStage, writer_key
from stagecoach_api.store import Corrupt, S3Store, Store, open_store
from stagecoach_api.writer_record import LEASE_SECONDS
from stagecoach_api.writers import read_lease, renew, take
from tests.s3 import Fault, FaultyFront, S3Server, make_bucket

DIGEST = "d" * 64


def attempt(uid: str = "one", number: int = 1, stage: str = "sft") -> ResolvedStage:
    values: dict[str, Any] = {"namespace": "team", "run": f"run-{uid}", "kind": "sft", "config": {}, "seed": 0}
    return ResolvedStage(
        **values, stage=stage, attempt=number, run_uid=uid, digest=DIGEST, code="c", storage_uri="file:///unused"
    )


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    make_bucket(s3_server.endpoint, "writers")
    return "writers"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("s3_server")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/{tmp_path.name}", endpoint=server.endpoint)


@pytest.fixture
def front(s3_server: S3Server) -> Iterator[FaultyFront]:
    with FaultyFront(s3_server.endpoint) as front:
        yield front


def age(folder: Path, seconds: float) -> None:
    """Make the lease in a folder store look as if it had been renewed so long ago."""
    path = folder / writer_key(DIGEST)
    os.utime(path, (time.time() - seconds,) * 2)


def test_one_attempt_has_the_right_and_another_run_waits(store: Store) -> None:
    taken, lease = take(store, attempt("one"))
    assert (taken, lease.record.epoch, lease.record.title) == (True, 1, "run team/run-one")
    assert LEASE_SECONDS - 5 <= lease.remaining <= LEASE_SECONDS
    taken, held = take(store, attempt("two"))
    assert (taken, held.record) == (False, lease.record)
    assert store.is_exclusive


def test_a_newer_attempt_of_the_run_takes_it_over_at_once_and_the_older_one_learns_it(store: Store) -> None:
    _, old = take(store, attempt("one", 1))
    old = renew(store, DIGEST, old) or old
    taken, lease = take(store, attempt("one", 2))
    assert (taken, lease.record.epoch) == (True, 2)
    assert renew(store, DIGEST, old) is None
    assert renew(store, DIGEST, lease) is not None
    assert not take(store, attempt("one", 1))[0], "a pod of the first attempt that starts late"
    assert take(store, attempt("one", 2))[0], "the pods of an attempt are replaced"


def test_another_stage_of_the_run_with_equal_work_waits(store: Store) -> None:
    take(store, attempt("one", 1, "sft"))
    assert not take(store, attempt("one", 9, "copy"))[0]


def test_a_released_right_is_free(store: Store) -> None:
    _, lease = take(store, attempt("one"))
    assert renew(store, DIGEST, lease, release=True) is not None
    found = read_lease(store, DIGEST)
    assert found is not None
    assert not found.is_alive
    assert take(store, attempt("two"))[1].record.epoch == 2


def test_a_lease_ends_by_the_stores_clock_not_by_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    take(store, attempt("one"))
    for hours in (-1, 1):
        monkeypatch.setattr("time.time", lambda hours=hours: 1.8e9 + 3600 * hours)
        assert not take(store, attempt("two"))[0]
    monkeypatch.undo()
    age(tmp_path, LEASE_SECONDS - 5)
    assert not take(store, attempt("two"))[0]
    age(tmp_path, LEASE_SECONDS + 1)
    assert take(store, attempt("two"))[0]


def test_a_record_that_cannot_be_read_is_named_and_kept(store: Store) -> None:
    store.write(writer_key(DIGEST), b"{")
    with pytest.raises(Corrupt, match=r"writer\.json: is not the record of a writer"):
        take(store, attempt())
    assert store.read(writer_key(DIGEST)) == b"{"


def test_an_object_is_replaced_only_if_it_is_the_version_that_was_read(store: Store) -> None:
    store.write("x/object", b"1")
    first = store.read_stamped("x/object")
    second = store.replace("x/object", b"2", first.tag)
    assert second is not None
    assert store.replace("x/object", b"3", first.tag) is None
    assert store.read("x/object") == b"2"
    assert store.replace("x/object", b"4", second) == store.read_stamped("x/object").tag
    assert store.replace("x/missing", b"5", first.tag) is None
    assert not store.exists("x/missing")
    assert [entry.key for entry in store.list("x")] == ["x/object"]
    assert abs(first.now - first.modified) < 60


# -- servers without conditions ----------------------------------------------------------------------------------------


def open_front(front: FaultyFront, bucket: str, tmp_path: Path) -> S3Store:
    found = open_store(f"s3://{bucket}/{tmp_path.name}", endpoint=front.endpoint)
    assert isinstance(found, S3Store)
    return found


def forget(store: S3Store, *headers: str) -> None:
    """Send no conditions: the server then does what one does that ignores them."""

    def strip(params: dict[str, Any], **_: Any) -> None:
        for header in headers:
            params["headers"].pop(header, None)

    store._client.meta.events.register("before-call.s3.PutObject", strip)


def refuse(front: FaultyFront) -> None:
    front.faults.append(Fault("PUT", "answer", times=99, status=501, code="NotImplemented", header="If-None-Match"))
    front.faults.append(Fault("PUT", "answer", times=99, status=501, code="NotImplemented", header="If-Match"))


@pytest.mark.parametrize("way", ["ignores", "refuses"])
def test_a_server_without_conditions_is_found_out_and_looked_at_before_each_write(
    front: FaultyFront, bucket: str, tmp_path: Path, way: str
) -> None:
    store = open_front(front, bucket, tmp_path)
    if way == "ignores":
        forget(store, "If-None-Match", "If-Match")
    else:
        refuse(front)
    taken, lease = take(store, attempt("one"))
    assert taken
    assert not store.is_exclusive
    assert not take(store, attempt("two"))[0]
    assert store.commit("manifest.json", b"1")
    assert not store.commit("manifest.json", b"2")
    assert store.read("manifest.json") == b"1"
    assert take(store, attempt("one", 2))[0]
    assert renew(store, DIGEST, lease) is None


def test_a_server_that_ignores_versions_only_is_found_out_too(front: FaultyFront, bucket: str, tmp_path: Path) -> None:
    store = open_front(front, bucket, tmp_path)
    forget(store, "If-Match")
    _, lease = take(store, attempt("one"))
    assert bool(store.is_exclusive) is True
    renewed = renew(store, DIGEST, lease)
    assert renewed is not None
    assert bool(store.is_exclusive) is False
    assert renew(store, DIGEST, lease) is None, "another version than the present one"
    assert renew(store, DIGEST, renewed) is not None


@pytest.mark.parametrize("action", ["lose", "reset", "answer"])
def test_a_renewal_or_takeover_whose_answer_was_lost_counts(
    front: FaultyFront, bucket: str, tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store = open_front(front, bucket, tmp_path)
    front.faults.append(Fault("PUT", action, target="writer.json", times=1))
    taken, lease = take(store, attempt("one", 1))
    assert (taken, lease.record.epoch) == (True, 1)
    renewed = renew(store, DIGEST, lease)
    assert renewed is not None
    front.faults.append(Fault("PUT", action, target="writer.json", times=1))
    renewed = renew(store, DIGEST, renewed)
    assert renewed is not None
    front.faults.append(Fault("PUT", action, target="writer.json", times=1))
    assert take(store, attempt("one", 2))[0]
    assert renew(store, DIGEST, renewed) is None


def test_what_the_right_costs_in_requests(front: FaultyFront, bucket: str, tmp_path: Path) -> None:
    store = open_front(front, bucket, tmp_path)
    _, lease = take(store, attempt())
    assert [request.split()[0] for request in front.requests] == ["HEAD", "PUT", "PUT", "GET"]
    front.requests.clear()
    renewed = renew(store, DIGEST, lease)
    assert renewed is not None
    assert [request.split()[0] for request in front.requests] == ["HEAD", "PUT", "PUT"]
    front.requests.clear()
    renew(store, DIGEST, renewed)
    store.commit("manifest.json", b"1")
    assert [request.split()[0] for request in front.requests] == ["PUT", "PUT"]
