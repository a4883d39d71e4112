"""The functions that `stagecoach artifacts` calls, on stores in a folder and in S3."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from stagecoach_api.artifacts import (
    Manifest,
    Parent,
    Pointer,
    StoredObject,
    canonical_json,
    content_digest,
    manifest_key,
    output_prefix,
    pointer_key,
    uri_below,
)
from stagecoach_api.store import Corrupt, Store
from stagecoach_cli.artifacts.store import UnknownArtifact, fetch, find, flatten, lineage, split_uri, verify

BASE, TUNED = "a" * 64, "b" * 64


def publish(
    store: Store, digest: str, stage: str, files: dict[str, bytes], parents: tuple[Parent, ...] = ()
) -> Manifest:
    """Write an artifact and its pointer."""
    objects = []
    for name, data in files.items():
        store.write(f"{output_prefix(digest)}/{name}", data)
        objects.append(StoredObject(path=name, size=len(data), sha256=_sha256(data)))
    manifest = Manifest(
        stage_digest=digest,
        content_digest=content_digest(objects),
        kind="sft",
        objects=tuple(objects),
        parents=parents,
        config={},
        code="test",
        seed=0,
        created=0.0,
    )
    store.write(manifest_key(digest), canonical_json(manifest.model_dump(mode="json")))
    pointer = Pointer(
        stage=stage,
        kind="sft",
        stage_digest=digest,
        content_digest=manifest.content_digest,
        uri=uri_below(store.uri, output_prefix(digest)),
        cached=False,
        recorded=0.0,
    )
    store.write(pointer_key("default", "tiny", stage), pointer.model_dump_json().encode())
    return manifest


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def pair(store: Store) -> Store:
    """A model and its tuned child."""
    base = publish(store, BASE, "base", {"model.safetensors": b"weights", "sub/config.json": b"{}"})
    parent = Parent(
        key="stage:base", digest=base.content_digest, stage_digest=BASE, uri=uri_below(store.uri, output_prefix(BASE))
    )
    publish(store, TUNED, "tuned", {"adapter.safetensors": b"adapter"}, (parent,))
    return store


def test_a_whole_lineage_verifies(pair: Store) -> None:
    checked = list(verify(pair, TUNED, "tiny/tuned"))
    assert [(item.member.key, item.num_objects, item.faults, item.notes) for item in checked] == [
        ("stage:base", 2, (), ()),
        ("tiny/tuned", 1, (), ()),
    ]


def test_a_flipped_byte_anywhere_in_the_lineage_is_named(pair: Store) -> None:
    key = f"{output_prefix(BASE)}/model.safetensors"
    pair.write(key, b"weightz")
    faults = [fault for item in verify(pair, TUNED, "tiny/tuned") for fault in item.faults]
    assert len(faults) == 1
    assert key in faults[0]


def test_a_shorter_a_missing_object_and_a_missing_manifest_are_named(pair: Store) -> None:
    pair.write(f"{output_prefix(TUNED)}/adapter.safetensors", b"ad")
    pair.delete(f"{output_prefix(BASE)}/sub/config.json")
    faults = [fault for item in verify(pair, TUNED, "tiny/tuned") for fault in item.faults]
    assert [fault.split(":")[0] for fault in faults] == [
        f"{output_prefix(BASE)}/sub/config.json",
        f"{output_prefix(TUNED)}/adapter.safetensors",
    ]
    pair.delete(manifest_key(BASE))
    faults = [fault for item in verify(pair, TUNED, "tiny/tuned") for fault in item.faults]
    assert f"{manifest_key(BASE)}: the manifest is missing" in faults


def test_a_manifest_that_was_edited_is_named(pair: Store) -> None:
    text = pair.read(manifest_key(BASE)).replace(b'"size":7', b'"size":8')
    pair.write(manifest_key(BASE), text)
    faults = [fault for item in verify(pair, BASE, "tiny/base") for fault in item.faults]
    assert any(fault.startswith(f"{manifest_key(BASE)}: its content digest does not match") for fault in faults)


def test_a_download_is_verified_and_never_leaves_a_damaged_file(pair: Store, tmp_path: Path) -> None:
    names = [path.relative_to(tmp_path / "copy").as_posix() for _, path in fetch(pair, BASE, tmp_path / "copy")]
    assert names == ["model.safetensors", "sub/config.json"]
    pair.write(f"{output_prefix(BASE)}/model.safetensors", b"weightz")
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        list(fetch(pair, BASE, tmp_path / "other"))
    assert not (tmp_path / "other" / "model.safetensors").exists()


def test_artifacts_are_found_by_name_and_by_a_digests_prefix(pair: Store) -> None:
    assert [find(pair, name) for name in ("tiny/base", "default/tiny/tuned", "bbbbbb", BASE)] == [
        BASE,
        TUNED,
        TUNED,
        BASE,
    ]
    for name in ("tiny/gone", "aaa", "cccccc"):
        with pytest.raises(UnknownArtifact, match="Known artifacts: tiny/base, tiny/tuned"):
            find(pair, name)


def test_a_lineage_lists_ancestors_first_and_each_once(pair: Store) -> None:
    root = lineage(pair, TUNED, "tiny/tuned")
    assert [item.stage_digest for item in flatten(root)] == [BASE, TUNED]


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        (f"s3://b/p/artifacts/{BASE}/output", ("s3://b/p", BASE)),
        (f"file:///s/artifacts/{BASE}/", ("file:///s", BASE)),
        ("tiny/base", None),
        ("file:///s/artifacts/abc", None),
    ],
)
def test_an_artifacts_uri_is_split_into_store_and_digest(uri: str, parts: tuple[str, str] | None) -> None:
    assert split_uri(uri) == parts
