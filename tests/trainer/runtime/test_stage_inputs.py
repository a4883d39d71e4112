"""Fetching of inputs: artifacts with every byte checked, external files that must not have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach_api.artifacts import (
    Manifest,
    ResolvedInput,
    canonical_json,
    content_digest,
    manifest_key,
    output_prefix,
)
from stagecoach_api.store import Corrupt, FolderStore, NotFound, Store, external_digest, list_external, open_store
from stagecoach_api.stores.base import parse_location
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.runtime.inputs import _gather, fetch_input, input_files

DIGEST = "a" * 64
FILES = {"model.safetensors": b"weights", "sub/config.json": b"{}"}


class RemoteStore(FolderStore):
    """A folder that behaves like S3: nothing in it can be read in place."""

    def local_path(self, key: str) -> Path | None:
        return None


def make_store(folder: Path, remote: bool = False) -> Store:
    return RemoteStore(parse_location(str(folder))) if remote else open_store(str(folder))  # type: ignore[arg-type]


def publish(store: Store, folder: Path) -> ResolvedInput:
    """Store an artifact of FILES with its manifest."""
    objects = []
    for name, data in FILES.items():
        path = folder / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        stored = store.upload(path, f"{output_prefix(DIGEST)}/{name}")
        objects.append(stored.model_copy(update={"path": name}))
    manifest = Manifest(
        stage_digest=DIGEST,
        content_digest=content_digest(objects),
        kind="data",
        objects=tuple(objects),
        config={},
        code="c",
        seed=0,
        created=0.0,
    )
    store.commit(manifest_key(DIGEST), canonical_json(manifest.model_dump(mode="json")))
    uri = f"{store.uri}/{output_prefix(DIGEST)}"
    return ResolvedInput(uri=uri, digest=manifest.content_digest, stage_digest=DIGEST)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in input_files(folder)}


def test_an_artifact_in_a_folder_is_read_in_place(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    found = fetch_input(publish(store, tmp_path), store, tmp_path / "cache")
    assert found == store.local_path(output_prefix(DIGEST))
    assert contents(found) == FILES


def test_a_remote_artifact_is_downloaded_once(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", remote=True)
    resolved = publish(store, tmp_path)
    folder = fetch_input(resolved, store, tmp_path / "cache")
    assert folder == tmp_path / "cache" / "inputs" / resolved.digest
    assert contents(folder) == FILES
    before = (folder / "model.safetensors").stat()
    fetch_input(resolved, store, tmp_path / "cache")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_a_damaged_download_is_fetched_again(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", remote=True)
    resolved = publish(store, tmp_path)
    folder = fetch_input(resolved, store, tmp_path / "cache")
    (folder / "model.safetensors").write_bytes(b"wEights")
    assert contents(fetch_input(resolved, store, tmp_path / "cache")) == FILES


def test_a_changed_download_of_an_external_input_is_fetched_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The size alone does not show that a file of the cache was changed."""

    source = RemoteStore(parse_location(str(tmp_path / "bucket")))  # type: ignore[arg-type]
    source.uri = "s3://bucket/texts"
    source.write("a.txt", b"four")
    entries = list(source.list())
    folder = tmp_path / "cache"
    _gather(entries, folder, source)
    before = (folder / "a.txt").stat().st_mtime_ns
    _gather(entries, folder, source)
    assert (folder / "a.txt").stat().st_mtime_ns == before
    (folder / "a.txt").write_bytes(b"five")
    _gather(entries, folder, source)
    assert contents(folder) == {"a.txt": b"four"}
    assert "made again" in caplog.text


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "remote"])
def test_a_flipped_byte_is_named(tmp_path: Path, remote: bool) -> None:
    store = make_store(tmp_path / "store", remote)
    resolved = publish(store, tmp_path)
    store.write(f"{output_prefix(DIGEST)}/sub/config.json", b"[}")
    with pytest.raises(Corrupt, match=r"output/sub/config\.json: bytes differ from the manifest"):
        fetch_input(resolved, store, tmp_path / "cache")


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "remote"])
def test_a_missing_object_is_named(tmp_path: Path, remote: bool) -> None:
    store = make_store(tmp_path / "store", remote)
    resolved = publish(store, tmp_path)
    store.delete(f"{output_prefix(DIGEST)}/model.safetensors")
    with pytest.raises((Corrupt, NotFound), match=r"output/model\.safetensors"):
        fetch_input(resolved, store, tmp_path / "cache")


def test_an_artifact_that_was_replaced_since_planning_is_rejected(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    resolved = publish(store, tmp_path).model_copy(update={"digest": "b" * 64})
    with pytest.raises(Corrupt, match="not the one this stage was planned with"):
        fetch_input(resolved, store, tmp_path / "cache")


def test_an_artifact_of_another_store_is_found_by_its_uri(tmp_path: Path) -> None:
    resolved = publish(make_store(tmp_path / "other"), tmp_path)
    found = fetch_input(resolved, make_store(tmp_path / "store"), tmp_path / "cache")
    assert contents(found) == FILES


def external(uri: str) -> ResolvedInput:
    return ResolvedInput(uri=uri, digest=external_digest(list_external(uri)[1]))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "notes.txt", "deep/c.jsonl"):
        (folder / name).write_text(name)
    return folder


def test_an_external_file_is_that_file(tmp_path: Path, corpus: Path) -> None:
    resolved = external(str(corpus / "a.jsonl"))
    assert fetch_input(resolved, make_store(tmp_path / "store"), tmp_path / "cache") == corpus / "a.jsonl"
    assert input_files(corpus / "a.jsonl") == [corpus / "a.jsonl"]


def test_an_external_folder_is_that_folder(tmp_path: Path, corpus: Path) -> None:
    assert fetch_input(external(str(corpus)), make_store(tmp_path / "store"), tmp_path / "cache") == corpus


def test_an_external_glob_is_a_folder_of_its_matches(tmp_path: Path, corpus: Path) -> None:
    folder = fetch_input(external(f"{corpus}/*.jsonl"), make_store(tmp_path / "store"), tmp_path / "cache")
    assert contents(folder) == {"a.jsonl": b"a.jsonl", "b.jsonl": b"b.jsonl"}


def test_a_folder_and_a_file_are_read_by_names_that_are_patterns_too(tmp_path: Path) -> None:
    for name in ("set[1]/what?.jsonl", "set[1]/whatX.jsonl", "set1/whatX.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    store, folder = make_store(tmp_path / "store"), tmp_path / "in" / "set[1]"
    assert fetch_input(external(str(folder)), store, tmp_path / "cache") == folder
    assert fetch_input(external(f"{folder}/what?.jsonl"), store, tmp_path / "cache") == folder / "what?.jsonl"


def test_files_in_linked_folders_are_those_that_the_digest_covers(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(corpus)
    keys = [entry.key for entry in list_external(str(tmp_path / "in"))[1]]
    assert [path.relative_to(tmp_path / "in").as_posix() for path in input_files(tmp_path / "in")] == keys
    assert "link/deep/c.jsonl" in keys


def test_an_external_input_that_changed_since_planning_is_an_error(tmp_path: Path, corpus: Path) -> None:
    resolved = external(str(corpus))
    (corpus / "b.jsonl").write_text("B.jsonl")
    with pytest.raises(UserError, match="changed since this stage was planned"):
        fetch_input(resolved, make_store(tmp_path / "store"), tmp_path / "cache")


def test_a_missing_external_input_is_named(tmp_path: Path) -> None:
    resolved = ResolvedInput(uri=str(tmp_path / "nowhere"), digest="e" * 64)
    with pytest.raises(NotFound, match="nowhere"):
        fetch_input(resolved, make_store(tmp_path / "store"), tmp_path / "cache")


def test_hidden_files_are_skipped(corpus: Path) -> None:
    (corpus / ".git").mkdir()
    (corpus / ".git" / "x").write_text("")
    assert [path.name for path in input_files(corpus)] == ["a.jsonl", "b.jsonl", "c.jsonl", "notes.txt"]
