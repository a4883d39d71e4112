"""A checkpoint that cannot be read ends the attempt and stays; only one whose bytes are wrong is passed over."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.artifacts import MANIFEST, StoredObject, checkpoints_prefix
from stagecoach_api.store import AccessDenied, FolderStore, S3Store, Store, StoreError, Unreachable
from stagecoach_api.stores.base import FolderLocation, S3Location
from stagecoach_api.stores.retry import Retrier
from stagecoach_trainer.loop.checkpoint import BrokenCheckpoint, read_checkpoint
from stagecoach_trainer.runtime.checkpoint_paths import CheckpointId
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.runtime.errors import UserError
from tests.s3 import Fault, FaultyFront, S3Server, make_bucket
from tests.trainer.loop.makers import context
from tests.trainer.loop.test_checkpoint import book_of, save, state

FOR_EVER = 10**9
NEWEST, OLDER = "step-00000020", "step-00000010"
WEIGHTS = "master.safetensors"
PREFIX = checkpoints_prefix("d" * 64)


def denied(target: str, **more: Any) -> Fault:
    return Fault("GET", "answer", target=target, **{"times": FOR_EVER, "status": 403, "code": "AccessDenied", **more})


# -- S3 ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """A bucket with the checkpoints of steps 10 and 20, and the proxy through which the next attempt reads it."""

    direct: Store
    front: FaultyFront
    through_front: Store
    folder: Path

    def objects(self) -> dict[str, str]:
        return {entry.key: entry.checksum for entry in self.direct.list()}

    def resume(self) -> CheckpointId | None:
        """Look for a checkpoint on a machine that has none."""
        here = replace(context(Path(tempfile.mkdtemp(dir=self.folder))), store=self.through_front)
        return book_of(here).find_newest()


@pytest.fixture(scope="module")
def full_bucket(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with FaultyFront(s3_server.endpoint) as front:
        make_bucket(s3_server.endpoint, "checkpoints")
        location, instant = S3Location("checkpoints", "run"), Retrier(sleep=lambda seconds: None)
        stores = [S3Store(location, endpoint, retrier=instant) for endpoint in (s3_server.endpoint, front.endpoint)]
        yield Bucket(stores[0], front, stores[1], tmp_path_factory.mktemp("machines"))


@pytest.fixture
def bucket(full_bucket: Bucket, tmp_path: Path) -> Iterator[Bucket]:
    full_bucket.direct.delete("artifacts")
    save(book_of(replace(context(tmp_path), store=full_bucket.direct), keepLast=9), state(10, 1.0), state(20, 2.0))
    yield full_bucket
    full_bucket.front.faults.clear()


def stored(bucket: Bucket, file: str, change: Callable[[bytes], bytes]) -> None:
    key = f"{PREFIX}/{NEWEST}/{file}"
    bucket.direct.write(key, change(bucket.direct.read(key)))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def of_format_2(data: bytes) -> bytes:
    return json.dumps(json.loads(data) | {"format": 2}).encode()


def remove_newest_weights(bucket: Bucket) -> None:
    bucket.direct.delete(f"{PREFIX}/{NEWEST}/{WEIGHTS}")


def damage(file: str, change: Callable[[bytes], bytes]) -> Callable[[Bucket], None]:
    return lambda bucket: stored(bucket, file, change)


def inject(method_fault: Fault) -> Callable[[Bucket], None]:
    return lambda bucket: bucket.front.faults.append(replace(method_fault))


weights = f"{NEWEST}/{WEIGHTS}"
FAULTS = [
    pytest.param(inject(denied(weights)), AccessDenied, id="403 on the weights"),
    pytest.param(inject(denied(weights, status=400, code="KMS.DisabledException")), AccessDenied, id="key disabled"),
    pytest.param(inject(denied("list-type=2")), AccessDenied, id="403 on the listing"),
    pytest.param(inject(denied(f"{NEWEST}/{MANIFEST}")), AccessDenied, id="403 on the manifest"),
    pytest.param(inject(denied(weights, status=503, code="SlowDown", times=2)), 20, id="503 for two tries"),
    pytest.param(inject(denied(weights, status=503, code="SlowDown")), Unreachable, id="503 for ever"),
    pytest.param(inject(Fault("GET", "reset", weights, FOR_EVER)), Unreachable, id="no answer"),
    pytest.param(inject(Fault("GET", "truncate", weights)), 20, id="one body cut short"),
    pytest.param(inject(Fault("GET", "truncate", weights, FOR_EVER)), StoreError, id="every body cut short"),
    pytest.param(inject(Fault("GET", "truncate", f"{NEWEST}/{MANIFEST}")), 20, id="one manifest cut short"),
    pytest.param(inject(Fault("GET", "flip", weights)), 20, id="a bit flipped on the way"),
    pytest.param(inject(Fault("GET", "flip", f"{NEWEST}/{MANIFEST}")), 20, id="a bit of the manifest flipped"),
    pytest.param(inject(denied(weights, status=412, code="PreconditionFailed")), StoreError, id="replaced while read"),
    pytest.param(damage(WEIGHTS, flipped), 10, id="a bit flipped in the store"),
    pytest.param(damage(WEIGHTS, lambda data: data[:-8]), 10, id="cut short in the store"),
    pytest.param(damage(MANIFEST, lambda data: data[:-2]), 10, id="half a manifest"),
    pytest.param(damage(MANIFEST, of_format_2), UserError, id="a manifest of another version"),
    pytest.param(remove_newest_weights, 10, id="an object is missing"),
]


@pytest.mark.parametrize(("fault", "outcome"), FAULTS)
def test_whatever_the_store_answers_every_checkpoint_stays(
    bucket: Bucket, fault: Callable[[Bucket], None], outcome: int | type[Exception]
) -> None:
    """S3 answers 403 for an object whose key the account may not use: all checkpoints of the stage were deleted."""
    fault(bucket)
    before = bucket.objects()
    if isinstance(outcome, int):
        assert bucket.resume() == CheckpointId(0, outcome)
    else:
        with pytest.raises(outcome) as caught:
            bucket.resume()
        assert not isinstance(caught.value, BrokenCheckpoint)
    assert bucket.objects() == before


def test_training_does_not_begin_again_while_the_only_checkpoint_lacks_a_file(bucket: Bucket) -> None:
    bucket.direct.delete(f"{PREFIX}/{OLDER}")
    remove_newest_weights(bucket)
    with pytest.raises(UserError, match=r"no checkpoint .* is complete: .*master\.safetensors.*restore what"):
        bucket.resume()
    stored(bucket, MANIFEST, lambda data: b"{}")  # nothing is left to be restored
    assert bucket.resume() is None
    assert f"{PREFIX}/{NEWEST}/state.json" in bucket.objects()


def test_old_checkpoints_that_may_not_be_deleted_do_not_end_training(
    bucket: Bucket, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    bucket.front.faults.append(Fault("DELETE", "answer", times=FOR_EVER, status=403, code="AccessDenied"))
    book = book_of(replace(context(tmp_path / "next"), store=bucket.through_front))
    book.find_newest()
    save(book, state(30, 3.0))
    assert "the superseded checkpoint of step 20 stays in the store" in caplog.text
    assert book.find_newest() == CheckpointId(0, 30)


# -- local copies ------------------------------------------------------------------------------------------------------


@dataclass
class Shaky(FolderStore):
    """A folder that behaves like S3: nothing in it can be read in place, and some objects cannot be read at all."""

    location: FolderLocation
    faults: dict[str, Exception] = field(default_factory=dict)
    """Errors by the end of a key."""
    downloads: int = 0

    def __post_init__(self) -> None:
        super().__init__(self.location)

    def local_path(self, key: str) -> Path | None:
        return None

    def read(self, key: str) -> bytes:
        self._fail(key)
        return super().read(key)

    def download(self, key: str, path: Path, expected: StoredObject | None = None) -> None:
        self._fail(key)
        self.downloads += 1
        super().download(key, path, expected)

    def _fail(self, key: str) -> None:
        for end, error in self.faults.items():
            if key.endswith(end):
                raise error


def shaky(folder: Path, machine: str = "first", world: World | None = None) -> tuple[StageContext, Shaky]:
    store = Shaky(FolderLocation(folder / "bucket"))
    return replace(context(folder / machine, world), store=cast(Store, store)), store


def copy_of(here: StageContext, file: str) -> Path:
    return here.cache / "checkpoints" / here.resolved.digest / NEWEST / file


def test_only_the_damaged_file_of_a_local_copy_is_downloaded_again(tmp_path: Path) -> None:
    here, store = shaky(tmp_path)
    save(book_of(here), state(20, 2.0))
    weights = copy_of(here, WEIGHTS)
    weights.write_bytes(flipped(weights.read_bytes()))
    store.faults["state.json"] = Unreachable("state.json", "not needed")
    book = book_of(here)
    assert book.find_newest() == CheckpointId(0, 20)
    assert store.downloads == 1
    assert read_checkpoint(book.fetch(CheckpointId(0, 20)), 0).step == 20


def test_a_damaged_local_copy_stays_until_the_store_answers(tmp_path: Path) -> None:
    here, store = shaky(tmp_path)
    save(book_of(here), state(20, 2.0))
    weights = copy_of(here, WEIGHTS)
    weights.write_bytes(flipped(weights.read_bytes()))
    store.faults[WEIGHTS] = Unreachable(WEIGHTS, "down")
    with pytest.raises(Unreachable):
        book_of(here).find_newest()
    assert weights.is_file()
    assert copy_of(here, MANIFEST).is_file()
    store.faults.clear()
    assert book_of(here).find_newest() == CheckpointId(0, 20)


def test_another_node_repairs_its_own_damaged_copy(tmp_path: Path) -> None:
    here, _ = shaky(tmp_path)
    save(book_of(here), state(20, 2.0))
    weights = copy_of(here, WEIGHTS)
    weights.write_bytes(flipped(weights.read_bytes()))
    other, _ = shaky(tmp_path, world=World(rank=1, local_rank=0, size=2))
    folder = book_of(other).fetch(CheckpointId(0, 20))
    assert read_checkpoint(folder, 1).step == 20


@pytest.mark.parametrize("file", [WEIGHTS, MANIFEST])
def test_a_folder_that_may_not_be_read_is_not_a_broken_checkpoint(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a network file system whose credentials have expired; root, who runs tests, may read everything."""
    here = context(tmp_path)
    save(book_of(here, keepLast=9), state(10, 1.0), state(20, 2.0))
    real = Path.open

    def refuse(path: Path, *values: Any, **more: Any) -> Any:
        if path.name == file and path.parent.name == NEWEST:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *values, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        book_of(here).find_newest()
    monkeypatch.undo()
    assert book_of(here).find_newest() == CheckpointId(0, 20)


def test_a_broken_checkpoint_is_superseded_by_the_next_one_of_any_step(tmp_path: Path) -> None:
    here, store = shaky(tmp_path)
    save(book_of(here, keepLast=9), state(10, 1.0), state(20, 2.0))
    store.write(f"{PREFIX}/{NEWEST}/{WEIGHTS}", b"x")
    here, _ = shaky(tmp_path, "second")
    book = book_of(here, keepLast=9)
    assert book.find_newest() == CheckpointId(0, 10)
    save(book, state(15, 3.0))
    assert book_of(shaky(tmp_path, "third")[0]).find_newest() == CheckpointId(1, 15)
    assert not list(store.list(f"{PREFIX}/{NEWEST}"))


# -- any sequence ------------------------------------------------------------------------------------------------------

FILES = (WEIGHTS, "state.json", MANIFEST)
UNREADABLE = (AccessDenied("x", "403"), Unreachable("x", "503"), StoreError("x", "truncated"))
EVENTS = st.one_of(
    st.tuples(st.just("unreadable"), st.sampled_from((NEWEST, OLDER)), st.sampled_from(FILES), st.integers(0, 2)),
    st.tuples(st.just("damaged"), st.sampled_from((NEWEST, OLDER)), st.sampled_from(FILES), st.just(0)),
    st.tuples(st.just("resumed"), st.just(""), st.just(""), st.just(0)),
    st.tuples(st.just("saved"), st.just(""), st.just(""), st.integers(1, 30)),
)


def intact(store: Shaky) -> set[CheckpointId]:
    """Oracle: the checkpoints of the bucket whose files all have the hash in their manifest."""
    found = set()
    for path in (store.location.path / PREFIX).glob(f"*/{MANIFEST}"):
        named = json.loads(path.read_bytes()).get("objects", ())
        hashes = [hashlib.sha256((path.parent / item["path"]).read_bytes()).hexdigest() for item in named]
        checkpoint = CheckpointId.of(path.parent.name)
        if named and checkpoint is not None and hashes == [item["sha256"] for item in named]:
            found.add(checkpoint)
    return found


@settings(max_examples=25)
@given(st.lists(EVENTS, min_size=1, max_size=6))
def test_no_sequence_of_faults_deletes_what_is_not_superseded(events: list[tuple[str, str, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here, store = shaky(Path(folder))
        save(book_of(here, keepLast=9), state(10, 1.0), state(20, 2.0))
        for index, (event, step, file, number) in enumerate(events):
            key = f"{PREFIX}/{step}/{file}"
            if event == "unreadable":
                store.faults[f"{step}/{file}"] = UNREADABLE[number]
            elif event == "damaged" and (store.location.path / key).is_file():
                store.write(key, b"{}")
            elif event in ("resumed", "saved"):
                check_attempt(Path(folder), store, f"machine-{index}", number if event == "saved" else None)


def check_attempt(folder: Path, store: Shaky, machine: str, step: int | None) -> None:
    """Resume on a new machine, and save `step` if it is given; check what was found and what has become of the rest."""
    book = book_of(replace(context(folder / machine), store=cast(Store, store)), keepLast=9)
    before, usable = files(store), intact(store)
    try:
        found = book.find_newest()
    except (StoreError, UserError):
        assert files(store) == before
        return
    assert files(store) == before
    assert found == max(usable, default=None)
    if step is not None:
        save(book, state(step, 9.0))
        kept = intact(store)
        assert max(kept) == book.newest
        assert all(checkpoint.step >= step for checkpoint in usable - kept)


def files(store: Shaky) -> dict[str, bytes]:
    return {entry.key: (store.location.path / entry.key).read_bytes() for entry in FolderStore.list(store)}
