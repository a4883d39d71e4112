"""One suite for both back ends, then tests of a single back end."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.artifacts import StoredObject
from stagecoach_api.store import (
    AccessDenied,
    Corrupt,
    FolderStore,
    NotFound,
    S3Store,
    Store,
    StoreEntry,
    StoreError,
    Unreachable,
    external_digest,
    list_external,
    open_store,
)
from stagecoach_api.stores import folder as folder_module
from stagecoach_api.stores.base import S3Location, parse_location
from stagecoach_api.stores.external import local_files
from stagecoach_api.stores.retry import Retrier, RetryPolicy
from tests.s3 import ACCESS_KEY, SECRET_KEY, Fault, FaultyFront, S3Server, make_bucket, make_server

pytestmark = pytest.mark.slow

MIB = 1 << 20
BUCKETS = itertools.count()
ODD_KEY = "runs/a b+c%20/汉字 é.json"


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    name = f"bucket-{os.getpid()}-{next(BUCKETS)}"
    make_bucket(s3_server.endpoint, name)
    return name


@pytest.fixture(params=["folder", "folder URI with blanks and Unicode", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix", endpoint=server.endpoint)
    return open_store(f"file://{tmp_path}/a b/汉字 100%25")


def instant(**settings: float) -> tuple[Retrier, list[float]]:
    """A retrier that does not wait; the list has the requested waits."""
    waits: list[float] = []
    policy = RetryPolicy(**settings)  # type: ignore[arg-type]
    return Retrier(policy, sleep=waits.append, clock=lambda: sum(waits), jitter=lambda: 0.0), waits


def file_of(path: Path, size: int) -> StoredObject:
    data = (hashlib.sha256(str(size).encode()).digest() * (size // 32 + 1))[:size]
    path.write_bytes(data)
    return StoredObject(path="blob", size=size, sha256=hashlib.sha256(data).hexdigest())


# -- both back ends ----------------------------------------------------------------------------------------------------


def test_an_object_is_written_read_and_replaced(store: Store) -> None:
    for key in ("plain", "a/b/c.json", ODD_KEY):
        store.write(key, b"one")
        store.write(key, b"two")
        assert store.read(key) == b"two"
        assert store.exists(key)
    store.write("empty", b"")
    assert store.read("empty") == b""


def test_a_missing_object_is_named(store: Store, tmp_path: Path) -> None:
    store.write("a/b", b"x")
    assert not store.exists("a")
    assert not store.exists("nothing")
    with pytest.raises(NotFound, match=r"^a/nothing: "):
        store.read("a/nothing")
    with pytest.raises(NotFound, match=r"^a: "):
        store.read("a")
    with pytest.raises(NotFound, match="nothing"):
        store.download("nothing", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_listing_is_sorted_relative_and_takes_a_prefix_as_a_folder(store: Store) -> None:
    for key in ("b/2", "b/10", "b-c/1", "a/x/y", "bb"):
        store.write(key, key.encode())
    assert [entry.key for entry in store.list()] == ["a/x/y", "b-c/1", "b/10", "b/2", "bb"]
    assert [entry.key for entry in store.list("b")] == ["b/10", "b/2"]
    assert [entry.key for entry in store.list("b/")] == ["b/10", "b/2"]
    assert [entry.key for entry in store.list("a/x/y")] == ["a/x/y"]
    assert [entry.size for entry in store.list("b/10")] == [4]
    assert list(store.list("nothing")) == []


def test_a_key_cannot_leave_the_root(store: Store, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"x")
    for key in ("../x", "/etc/passwd", "a/../../x", "a//b", "", "a/", ".", "a\0b"):
        for use in (store.read, store.exists, lambda key: store.write(key, b""), lambda key: store.commit(key, b"")):
            with pytest.raises(StoreError, match="is not a key"):
                use(key)
        with pytest.raises(StoreError, match="is not a key"):
            store.upload(tmp_path / "target", key)
    with pytest.raises(StoreError, match="is not a key"):
        store.delete("")


def test_a_commit_is_made_once(store: Store) -> None:
    assert store.commit("a/manifest.json", b"first")
    assert not store.commit("a/manifest.json", b"second")
    assert not store.commit("a/manifest.json", b"first")
    assert store.read("a/manifest.json") == b"first"


def test_of_concurrent_commits_exactly_one_is_first(store: Store) -> None:
    barrier = threading.Barrier(2)

    def commit(key: str, mine: bytes) -> bool:
        barrier.wait()
        return store.commit(key, mine)

    for round_ in range(5):
        key = f"race/{round_}"
        with ThreadPoolExecutor(2) as pool:
            won = [future.result() for future in [pool.submit(commit, key, mine) for mine in (b"left", b"right")]]
        assert sorted(won) == [False, True]
        assert store.read(key) == (b"left" if won[0] else b"right")


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 20 * MIB + 7], ids=["empty", "a byte", "one part", "several parts"])
def test_a_file_is_downloaded_as_it_was_uploaded(store: Store, tmp_path: Path, size: int) -> None:
    expected = file_of(tmp_path / "source", size)
    stored = store.upload(tmp_path / "source", "deep/汉字/blob")
    assert stored == expected.model_copy(update={"path": "deep/汉字/blob"})
    store.download("deep/汉字/blob", tmp_path / "new folder" / "target", stored)
    assert (tmp_path / "new folder" / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["target"]


def test_the_start_of_an_object_is_read_without_the_rest(store: Store) -> None:
    store.write("model.safetensors", bytes(range(200)))
    assert store.read_start("model.safetensors", 8) == bytes(range(8))
    assert store.read_start("model.safetensors", 1000) == bytes(range(200))
    store.write("empty", b"")
    assert store.read_start("empty", 8) == b""
    with pytest.raises(NotFound, match=r"^absent: "):
        store.read_start("absent", 8)


def test_a_flipped_byte_is_found_and_named_and_nothing_is_left(store: Store, tmp_path: Path) -> None:
    expected = file_of(tmp_path / "source", 3000)
    data = bytearray((tmp_path / "source").read_bytes())
    data[1234] ^= 1
    store.write("x/model.safetensors", bytes(data))
    (tmp_path / "target").write_bytes(b"old")
    with pytest.raises(Corrupt, match=r"^x/model\.safetensors: bytes differ"):
        store.download("x/model.safetensors", tmp_path / "target", expected)
    store.write("x/model.safetensors", bytes(data[:2999]))
    with pytest.raises(Corrupt, match="2999 bytes"):
        store.download("x/model.safetensors", tmp_path / "target", expected)
    assert (tmp_path / "target").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]


def test_delete_removes_a_folder_and_keeps_its_siblings(store: Store) -> None:
    for key in ("a/1", "a/b/manifest.json", "ab/1", "c"):
        store.write(key, b"")
    store.delete("a")
    assert [entry.key for entry in store.list()] == ["ab/1", "c"]
    store.delete("c")
    store.delete("nothing")
    assert [entry.key for entry in store.list()] == ["ab/1"]


def test_a_folder_store_is_read_in_place_and_s3_is_not(store: Store) -> None:
    store.write("a/b", b"x")
    path = store.local_path("a")
    if isinstance(store, S3Store):
        assert path is None
    else:
        assert path is not None
        assert (path / "b").read_bytes() == b"x"


def test_a_store_opens_again_at_its_own_uri(store: Store, s3_server: S3Server) -> None:
    store.write("a", b"x")
    assert open_store(store.uri, endpoint=s3_server.endpoint).read("a") == b"x"


def test_a_full_disk_is_an_error_with_the_key_and_nothing_half_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a/b", b"old")
    file_of(tmp_path / "source", 100)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stagecoach_api.stores.folder.os.fsync", full)
    with pytest.raises(StoreError, match=r"^a/b: no space left"):
        store.download("a/b", tmp_path / "target")
    if isinstance(store, FolderStore):
        for write in (lambda: store.write("a/b", b"new"), lambda: store.commit("a/c", b"new")):
            with pytest.raises(StoreError, match=r"^a/[bc]: no space left"):
                write()
        with pytest.raises(StoreError, match=r"^a/b: no space left"):
            store.upload(tmp_path / "source", "a/b")
    monkeypatch.undo()
    assert not (tmp_path / "target").exists()
    assert store.read("a/b") == b"old"
    assert [entry.key for entry in store.list()] == ["a/b"]


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_partly_written_file_left_by_a_crash_is_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b", b"x")
    with folder_module.temporary_file(tmp_path / "a" / "c") as (temporary, _):
        os.link(temporary, tmp_path / "a" / temporary.name.replace("stagecoach-", "stagecoach-0"))  # outlives it
    assert len(list((tmp_path / "a").iterdir())) == 2
    assert [entry.key for entry in store.list()] == ["a/b"]


def test_a_folder_without_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AccessDenied, match=r"^a: permission denied for"):
        open_store(str(tmp_path)).write("a", b"")


def test_a_file_system_without_hard_links_is_rejected_before_anything_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(StoreError, match="has no hard links"):
        open_store(str(tmp_path)).commit("a", b"")
    assert list(open_store(str(tmp_path)).list()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        pytest.param("http://host/x", "scheme is not supported", id="another scheme"),
        pytest.param("s3://", "has no bucket", id="no bucket"),
        pytest.param("file://host/x", "not a local path", id="another host"),
        pytest.param("s3://key:hidden@bucket/x", "credentials in the URI", id="credentials in the URI"),
        pytest.param("ftp://key:hidden@host/x", "scheme is not supported", id="credentials in a foreign URI"),
    ],
)
def test_an_invalid_location_is_rejected_without_repeating_secrets(uri: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_store(uri)
    assert "hidden" not in str(caught.value)


def test_all_ways_to_write_a_location_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    same = ["a b/汉", f"{tmp_path}/a b/汉", f"file://{tmp_path}/a%20b/%E6%B1%89", f"file://localhost{tmp_path}/a b/汉"]
    assert {parse_location(uri).uri for uri in same} == {f"file://{tmp_path}/a b/汉"}
    assert parse_location("s3://bucket/a/b/").uri == "s3://bucket/a/b"


# -- S3 under faults ---------------------------------------------------------------------------------------------------


@pytest.fixture
def front(s3_server: S3Server) -> Iterator[FaultyFront]:
    with FaultyFront(s3_server.endpoint) as front:
        yield front


def s3_store(bucket: str, endpoint: str, **settings: float) -> tuple[S3Store, list[float]]:
    retrier, waits = instant(**settings)
    return S3Store(S3Location(bucket, "p"), endpoint=endpoint, retrier=retrier), waits


TRANSIENT = [
    pytest.param({"action": "reset"}, id="the connection breaks"),
    pytest.param({"action": "lose"}, id="it is done and the answer lost"),
    pytest.param({"action": "answer", "status": 500, "code": "InternalError"}, id="500"),
    pytest.param({"action": "answer", "status": 503, "code": "SlowDown"}, id="503 slow down"),
    pytest.param({"action": "answer", "status": 429, "code": "TooManyRequests"}, id="429"),
]


@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("operation", ["read", "write", "list", "exists", "delete", "commit", "upload", "download"])
def test_each_request_is_retried(
    operation: str, fault: dict[str, object], front: FaultyFront, bucket: str, tmp_path: Path
) -> None:
    store, waits = s3_store(bucket, front.endpoint)
    store.write("old", b"old")
    expected = file_of(tmp_path / "source", 9 * MIB if operation == "upload" else 10)
    method = {"read": "GET", "list": "GET", "download": "GET", "exists": "HEAD", "delete": "DELETE"}
    front.faults.append(Fault(method.get(operation, "PUT"), times=2, **fault))  # type: ignore[arg-type]
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("old"),
        "write": lambda: store.write("new", b"new"),
        "list": lambda: [entry.key for entry in store.list()],
        "exists": lambda: store.exists("old"),
        "delete": lambda: store.delete("old"),
        "commit": lambda: store.commit("new", b"new"),
        "upload": lambda: store.upload(tmp_path / "source", "new").sha256,
        "download": lambda: store.download("old", tmp_path / "target"),
    }
    results = {"read": b"old", "list": ["old"], "exists": True, "commit": True, "upload": expected.sha256}
    assert calls[operation]() == results.get(operation)
    effects: dict[str, Callable[[], bool]] = {
        "write": lambda: store.read("new") == b"new",
        "delete": lambda: not store.exists("old"),
        "commit": lambda: store.read("new") == b"new",
        "download": lambda: (tmp_path / "target").read_bytes() == b"old",
    }
    assert operation not in effects or effects[operation]()
    assert len(waits) == 2
    assert front.faults[0].times == 0


def test_only_the_part_that_failed_is_sent_again(front: FaultyFront, bucket: str, tmp_path: Path) -> None:
    store, _ = s3_store(bucket, front.endpoint)
    expected = file_of(tmp_path / "source", 30 * MIB)
    front.faults += [
        Fault("PUT", "reset", "partNumber=2"),
        Fault("POST", "lose", "uploads"),
        Fault("POST", "lose", "uploadId="),  # the completion succeeds, but its response is lost
    ]
    stored = store.upload(tmp_path / "source", "blob")
    assert front.seen("PUT", "partNumber=") == 5
    store.download("blob", tmp_path / "target", stored)
    assert stored.sha256 == expected.sha256


def test_an_upload_that_fails_leaves_no_parts(front: FaultyFront, bucket: str, tmp_path: Path) -> None:
    store, _ = s3_store(bucket, front.endpoint)
    file_of(tmp_path / "source", 20 * MIB)
    front.faults.append(Fault("PUT", "answer", "partNumber=2", status=400, code="InvalidPart"))
    with pytest.raises(StoreError, match=r"^blob: the request failed .*400 InvalidPart"):
        store.upload(tmp_path / "source", "blob")
    assert front.seen("DELETE", "uploadId=") == 1
    assert not store.exists("blob")


@pytest.mark.parametrize("action", ["truncate", "flip"])
def test_a_damaged_download_is_retried(front: FaultyFront, bucket: str, tmp_path: Path, action: str) -> None:
    store, _ = s3_store(bucket, front.endpoint)
    expected = file_of(tmp_path / "source", 20 * MIB)
    store.upload(tmp_path / "source", "blob")
    front.faults.append(Fault("GET", action, "blob"))
    store.download("blob", tmp_path / "target", expected)
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_request_that_timed_out_is_retried(front: FaultyFront, bucket: str) -> None:
    store, waits = s3_store(bucket, front.endpoint)
    front.faults.append(Fault("PUT", "answer", status=400, code="RequestTimeout", times=2))
    store.write("a", b"x")
    assert len(waits) == 2


def test_a_permanent_conflict_is_not_retried(front: FaultyFront, bucket: str) -> None:
    store, waits = s3_store(bucket, front.endpoint)
    front.faults.append(Fault("PUT", "answer", status=409, code="ObjectParentIsFile", times=9))
    with pytest.raises(StoreError, match=r"^a: the request failed .*409 ObjectParentIsFile"):
        store.write("a", b"x")
    assert waits == []


def test_a_truncated_read_is_retried(front: FaultyFront, bucket: str) -> None:
    store, _ = s3_store(bucket, front.endpoint)
    store.write("a", b"0123456789")
    front.faults.append(Fault("GET", "truncate", "/a"))
    assert store.read("a") == b"0123456789"


def test_an_object_replaced_while_it_is_read_is_corrupt(front: FaultyFront, bucket: str, tmp_path: Path) -> None:
    store, _ = s3_store(bucket, front.endpoint)
    store.write("a", b"x")
    front.faults.append(Fault("GET", "answer", "/a", times=9, status=412, code="PreconditionFailed"))
    with pytest.raises(Corrupt, match=r"^a: the object was replaced"):
        store.download("a", tmp_path / "target")


@pytest.mark.parametrize("loss", ["lose", "reset"])
def test_a_commit_whose_answer_was_lost_is_still_ours(front: FaultyFront, bucket: str, loss: str) -> None:
    store, _ = s3_store(bucket, front.endpoint)
    front.faults.append(Fault("PUT", loss))
    assert store.commit("m", b"same")
    assert not store.commit("m", b"same")


def test_a_commit_that_lost_the_race_after_a_conflict_is_not_ours(front: FaultyFront, bucket: str) -> None:
    store, _ = s3_store(bucket, front.endpoint)
    other, _ = s3_store(bucket, front.upstream)
    conflict = Fault("PUT", "answer", status=409, code="ConditionalRequestConflict")
    front.faults.append(conflict)
    retrier = Retrier(RetryPolicy(), sleep=lambda _: other.write("m", b"same"), jitter=lambda: 0.0)
    racing = S3Store(S3Location(bucket, "p"), endpoint=front.endpoint, retrier=retrier)
    assert not racing.commit("m", b"same")
    assert not store.commit("m", b"same")


def test_a_server_without_conditional_writes_gets_head_then_put(front: FaultyFront, bucket: str) -> None:
    store, waits = s3_store(bucket, front.endpoint)
    front.faults.append(Fault("PUT", "answer", status=501, code="NotImplemented", header="If-None-Match", times=99))
    assert store.commit("m", b"1")
    assert not store.commit("m", b"2")
    assert store.commit("n", b"1")
    assert front.faults[0].times == 98  # tried once, then remembered
    assert waits == []


def test_a_listing_goes_through_all_pages(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = s3_store(bucket, s3_server.endpoint)
    keys = [f"k/{index:02}" for index in range(7)]
    for key in keys:
        store.write(key, b"")
    client = store._client
    whole = client.list_objects_v2
    pages: list[int] = []

    def small(**arguments: object) -> object:
        page = whole(**arguments, MaxKeys=3)  # type: ignore[arg-type]
        pages.append(len(page["Contents"]))
        return page

    monkeypatch.setattr(client, "list_objects_v2", small)
    assert [entry.key for entry in store.list("k")] == keys
    assert pages == [3, 3, 1]


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AccessDenied"])
def test_wrong_credentials_are_reported_with_their_source_and_not_retried(
    front: FaultyFront, bucket: str, code: str
) -> None:
    store, waits = s3_store(bucket, front.endpoint)
    front.faults.append(Fault("GET", "answer", status=403, code=code, times=9))
    with pytest.raises(AccessDenied, match=rf"^a: .*403 {code}.*AWS_ACCESS_KEY_ID") as caught:
        store.read("a")
    assert waits == []
    assert_no_secret(caught.value)


def test_the_server_itself_rejects_a_wrong_secret(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyFront(s3_server.endpoint) as front:
        if type(s3_server).__name__ == "MotoServer":  # it accepts any credentials
            front.faults.append(Fault("GET", "answer", status=403, code="SignatureDoesNotMatch", times=9))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-canary")
        store, _ = s3_store(bucket, front.endpoint)
        with pytest.raises(AccessDenied, match="wrong credentials") as caught:
            store.read("a")
    assert "canary" not in f"{caught.value!r} {caught.value} {store!r}"


def test_missing_credentials_are_reported_with_where_they_are_read_from(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store, waits = s3_store(bucket, s3_server.endpoint)
    with pytest.raises(AccessDenied, match=r"no usable credentials .*~/\.aws/credentials"):
        store.exists("a")
    assert waits == []


def test_a_missing_bucket_is_named(s3_server: S3Server) -> None:
    store, _ = s3_store("no-such-bucket", s3_server.endpoint)
    with pytest.raises(NotFound, match="bucket does not exist in s3://no-such-bucket/p"):
        store.write("a", b"")
    with pytest.raises(NotFound, match="no-such-bucket"):
        list(store.list())


def test_a_store_that_never_answered_gives_up_early_and_names_the_endpoint() -> None:
    store, waits = s3_store("b", "http://user:hidden@127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"^a: s3://b/p cannot be reached \(http://127\.0\.0\.1:9") as caught:
        store.read("a")
    assert len(waits) == 3
    assert "hidden" not in str(caught.value)


def test_waits_grow_are_bounded_and_stop_at_the_deadline() -> None:
    def fail(_: int) -> None:
        raise ConnectionError

    retrier, waits = instant(base_seconds=1.0, max_seconds=8.0, deadline_seconds=1000.0, max_attempts=7)
    with pytest.raises(ConnectionError):
        retrier.call(fail, lambda _: True)
    assert waits == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert RetryPolicy().wait_seconds(1, 0.999) <= RetryPolicy().base_seconds
    retrier, waits = instant(deadline_seconds=5.0)
    with pytest.raises(ConnectionError):
        retrier.call(fail, lambda _: True)
    assert sum(waits) <= 5.0


def test_a_server_that_goes_away_and_comes_back_is_waited_for(s3_credentials: None, tmp_path: Path) -> None:
    server = make_server(tmp_path / "server")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 4:
            server.start()

    store = S3Store(S3Location("bucket", ""), endpoint=server.endpoint, retrier=Retrier(sleep=sleep))
    expected = file_of(tmp_path / "source", 1000)
    try:
        server.start()
        make_bucket(server.endpoint, "bucket")
        store.upload(tmp_path / "source", "first")
        server.stop()
        store.upload(tmp_path / "source", "second")
        assert len(waits) == 4
        assert [entry.key for entry in store.list()] == ["first", "second"]
        server.stop()
        with pytest.raises(Unreachable, match=r"^second: "):
            store.download("second", tmp_path / "target", expected)
        assert len(waits) == 4 + 9
        assert not (tmp_path / "target").exists()
    finally:
        server.stop()


def assert_no_secret(error: Exception) -> None:
    text = f"{error} {error!r} {error.__cause__!r} {error.__context__ if error.__suppress_context__ is False else ''}"
    assert SECRET_KEY not in text
    assert ACCESS_KEY not in text


# -- inputs from outside -----------------------------------------------------------------------------------------------

FILES = ("a.txt", "b.txt", "b.json", "sub/c.txt", "sub/deep/d.txt", ".hidden.txt", ".git/x.txt", "sub/.e.txt")


@pytest.fixture(params=["local", "s3"])
def outside(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str | None]:
    """The root of FILES, and the endpoint it is read from."""
    if request.param == "local":
        root, endpoint = str(tmp_path / "in put"), None
    else:
        root = f"s3://{request.getfixturevalue('bucket')}/in put"
        endpoint = request.getfixturevalue("s3_server").endpoint
    store = open_store(root, endpoint=endpoint)
    for name in FILES:
        store.write(name, name.encode())
    return root, endpoint


@pytest.mark.parametrize(
    ("path", "root", "keys"),
    [
        pytest.param("", "", ["a.txt", "b.json", "b.txt", "sub/c.txt", "sub/deep/d.txt"], id="a folder, all of it"),
        pytest.param("/", "", ["a.txt", "b.json", "b.txt", "sub/c.txt", "sub/deep/d.txt"], id="a folder with a slash"),
        pytest.param("/a.txt", "", ["a.txt"], id="a file"),
        pytest.param("/sub/deep/d.txt", "/sub/deep", ["d.txt"], id="a deep file"),
        pytest.param("/.hidden.txt", "", [".hidden.txt"], id="a hidden file that is named"),
        pytest.param("/*.txt", "", ["a.txt", "b.txt"], id="a star stays in its folder"),
        pytest.param("/b.*", "", ["b.json", "b.txt"], id="a star after letters"),
        pytest.param("/[ab].txt", "", ["a.txt", "b.txt"], id="a set"),
        pytest.param("/?.json", "", ["b.json"], id="one letter"),
        pytest.param("/*/c.txt", "", ["sub/c.txt"], id="a star for a folder"),
        pytest.param("/sub/*.txt", "/sub", ["c.txt"], id="a star below a folder"),
        pytest.param("/**/*.txt", "", ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt"], id="any depth"),
        pytest.param("/sub/**", "/sub", ["c.txt", "deep/d.txt"], id="everything below"),
        pytest.param("/.*.txt", "", [".hidden.txt"], id="a pattern that names hidden files"),
    ],
)
def test_a_file_a_folder_or_a_glob_is_found(
    outside: tuple[str, str | None], path: str, root: str, keys: list[str]
) -> None:
    uri, endpoint = outside
    found_root, entries = list_external(uri + path, endpoint)
    assert found_root == parse_location(uri + root).uri
    assert [entry.key for entry in entries] == keys
    kind = "sha256:" if endpoint is None else "etag:"
    assert all(entry.checksum.startswith(kind) for entry in entries)


@pytest.mark.parametrize("name", ["what?.jsonl", "a*.jsonl", "[ab].jsonl", "**", "set[1]/part?.jsonl"])
def test_a_name_is_looked_for_before_it_is_read_as_a_pattern(outside: tuple[str, str | None], name: str) -> None:
    """s3contents#165, s3fs#565: a key with `?` and one that the pattern would match, too."""
    uri, endpoint = outside
    store = open_store(uri, endpoint=endpoint)
    for other in (name, name.replace("?", "X").replace("*", "Y").replace("[ab]", "a").replace("[1]", "1")):
        store.write(other, other.encode())
    folder, _, key = name.rpartition("/")
    root, entries = list_external(f"{uri}/{name}", endpoint)
    assert [(entry.key, entry.size) for entry in entries] == [(key, len(name))]
    assert root == parse_location(f"{uri}/{folder}").uri
    if folder:  # a folder whose name is a pattern, too
        assert [entry.key for entry in list_external(f"{uri}/{folder}", endpoint)[1]] == [key]


@given(names=st.sets(st.text(alphabet="a?*[]b", min_size=1, max_size=4), min_size=1, max_size=6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_file_is_found_by_its_own_name(names: set[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).write_bytes(name.encode())
        name = data.draw(st.sampled_from(sorted(names)))
        assert local_files(Path(folder) / name) == (Path(folder), [name])


@pytest.mark.parametrize("path", ["/nothing", "/nothing/*.txt", "/*.parquet", "/sub/a.txt"])
def test_a_uri_that_matches_nothing_is_named(outside: tuple[str, str | None], path: str) -> None:
    uri, endpoint = outside
    with pytest.raises(NotFound, match="no such file") as caught:
        list_external(uri + path, endpoint)
    assert caught.value.key == uri + path


def test_one_byte_changes_the_digest_and_order_does_not(outside: tuple[str, str | None]) -> None:
    uri, endpoint = outside
    _, before = list_external(uri, endpoint)
    assert external_digest(before) == external_digest(reversed(before))
    assert external_digest(before) == external_digest(list_external(uri + "/", endpoint)[1])
    open_store(uri, endpoint=endpoint).write("sub/c.txt", b"sub/c.tXt")
    assert external_digest(before) != external_digest(list_external(uri, endpoint)[1])


def test_local_checksums_are_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    _, entries = list_external(str(tmp_path))
    assert entries == [StoreEntry("a", 1, "sha256:" + hashlib.sha256(b"x").hexdigest())]


def test_linked_folders_are_followed_and_cycles_are_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert [entry.key for entry in list_external(str(tmp_path / "in"))[1]] == ["link/a"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotFound, match="links to a file that does not exist") as caught:
        list_external(str(tmp_path))
    assert caught.value.key == str(tmp_path / "gone")


# -- what importing costs ----------------------------------------------------------------------------------------------

BARE = """
import sys
from importlib.abc import MetaPathFinder

HEAVY = ("boto3", "botocore", "torch", "click", "rich", "psutil", "transformers", "kopf", "kubernetes", "numpy")


class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, Refuse())
import importlib
import pkgutil

import stagecoach_api

names = [module.name for module in pkgutil.walk_packages(stagecoach_api.__path__, "stagecoach_api.")]
for name in names:
    importlib.import_module(name)
from stagecoach_api.store import open_store

store = open_store(sys.argv[1])
store.write("a", b"x")
assert store.read("a") == b"x"
loaded = sorted(name for name in HEAVY if name in sys.modules)
print(len(names), loaded)
"""


def test_the_contract_imports_with_nothing_but_pydantic_and_pyyaml(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    count, loaded = done.stdout.strip().split(" ", 1)
    assert int(count) > 15
    assert loaded == "[]"
