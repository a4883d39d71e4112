"""Look-ups that both drivers make: absolute URIs, external inputs, manifests."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach_api.artifacts import ResolvedInput, manifest_key, uri_below
from stagecoach_api.store import Corrupt, NotFound, open_store
from stagecoach_api.stores.lookup import absolute, find_inputs, find_manifest, read_manifest

DIGEST = "a" * 64


@pytest.mark.parametrize(
    ("uri", "root", "expected"),
    [
        ("data/a.txt", "file:///run", "file:///run/data/a.txt"),
        ("../a.txt", "file:///run/here", "file:///run/a.txt"),
        ("data/*.txt", "s3://bucket/in/", "s3://bucket/in/data/*.txt"),
        ("/data/a.txt", "s3://bucket", "file:///data/a.txt"),
        ("s3://other/x", "file:///run", "s3://other/x"),
        ("file:///data/a b", "s3://bucket", "file:///data/a b"),
    ],
)
def test_relative_uris_are_resolved_and_absolute_ones_stay(uri: str, root: str, expected: str) -> None:
    assert absolute(uri, root) == expected


def test_every_input_is_found_or_has_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    found = find_inputs({"here": f"file://{tmp_path}/a.txt", "gone": f"file://{tmp_path}/b.txt"})
    here, gone = found["here"], found["gone"]
    assert isinstance(here, ResolvedInput)
    assert here.uri == f"file://{tmp_path}/a.txt"
    assert len(here.digest) == 64
    assert isinstance(gone, NotFound)
    assert "b.txt" in gone.key


def test_an_invalid_manifest_is_corrupt_and_a_missing_one_not_found(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert find_manifest(store, DIGEST) is None
    with pytest.raises(NotFound):
        read_manifest(store, DIGEST)
    store.write(manifest_key(DIGEST), b"{}")
    with pytest.raises(Corrupt, match="delete the artifact"):
        read_manifest(store, DIGEST)
    with pytest.raises(Corrupt, match="delete the artifact"):
        find_manifest(store, DIGEST)


def test_an_artifact_is_stored_below_the_storage_uri() -> None:
    assert uri_below("s3://bucket/x/", f"artifacts/{DIGEST}") == f"s3://bucket/x/artifacts/{DIGEST}"
