"""Garbage collection: which artifacts are needed, as properties of any store; deletion, in a folder and in S3."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.artifacts import (
    Manifest,
    Parent,
    Pointer,
    StoredObject,
    canonical_json,
    checkpoint_name,
    checkpoints_prefix,
    content_digest,
    manifest_key,
    output_prefix,
    pointer_key,
)
from stagecoach_api.store import Corrupt, Store, StoreEntry
from stagecoach_cli.artifacts.collect import (
    StoredArtifact,
    delete,
    digests_of_record,
    group_by_artifact,
    parents_of,
    pointer_targets,
    reachable,
    survey,
    unneeded,
)
from stagecoach_cli.display.numbers import size
from tests.cli.cluster.makers import NAMESPACE, FakeCluster, stage_status
from tests.cli.makers import Bench, Cli, chain

pytestmark = pytest.mark.slow

NOW = 1_800_000_000.0
DAY = 86_400.0
KEPT, PARENT, OLD, YOUNG, HALF = (letter * 64 for letter in "abcde")


# -- which artifacts are needed ----------------------------------------------------------------------------------------

DIGESTS = st.integers(min_value=0, max_value=15).map(lambda number: f"{number:064x}")
ARTIFACTS = st.builds(
    StoredArtifact,
    digest=DIGESTS,
    num_objects=st.just(1),
    size=st.just(1),
    newest=st.floats(min_value=0, max_value=100),
    is_finished=st.booleans(),
    parents=st.frozensets(DIGESTS, max_size=4),
)
STORES = st.lists(ARTIFACTS, max_size=16).map(lambda items: {item.digest: item for item in items})


@given(STORES, st.sets(DIGESTS, max_size=4), st.floats(min_value=0, max_value=100))
def test_roots_recent_artifacts_and_their_ancestors_are_needed(
    artifacts: dict[str, StoredArtifact], roots: set[str], young_since: float
) -> None:
    garbage = {item.digest for item in unneeded(artifacts, roots, young_since)}
    needed = {digest for digest, item in artifacts.items() if digest in roots or item.newest > young_since}
    while True:  # an oracle: grow the set step by step until it is closed
        more = needed | {parent for digest in needed & artifacts.keys() for parent in artifacts[digest].parents}
        if more == needed:
            break
        needed = more
    assert garbage == artifacts.keys() - needed


@given(STORES, st.sets(DIGESTS, max_size=4), st.floats(min_value=0, max_value=100), st.data())
def test_another_root_never_makes_more_garbage(
    artifacts: dict[str, StoredArtifact], roots: set[str], young_since: float, data: st.DataObject
) -> None:
    more = roots | {data.draw(DIGESTS)}
    before = {item.digest for item in unneeded(artifacts, roots, young_since)}
    assert {item.digest for item in unneeded(artifacts, more, young_since)} <= before


@given(STORES, st.sets(DIGESTS, max_size=4), st.floats(min_value=0, max_value=100))
def test_a_second_collection_finds_no_garbage(
    artifacts: dict[str, StoredArtifact], roots: set[str], young_since: float
) -> None:
    gone = {item.digest for item in unneeded(artifacts, roots, young_since)}
    left = {digest: item for digest, item in artifacts.items() if digest not in gone}
    assert unneeded(left, roots, young_since) == []


def test_a_lineage_with_a_loop_ends() -> None:
    pair = {
        KEPT: StoredArtifact(KEPT, 1, 1, 0.0, True, parents=frozenset({OLD})),
        OLD: StoredArtifact(OLD, 1, 1, 0.0, True, parents=frozenset({KEPT})),
    }
    assert reachable(pair, {KEPT}) == {KEPT, OLD}


def test_objects_are_grouped_by_artifact_with_the_time_of_the_newest() -> None:
    entries = [
        StoreEntry(f"artifacts/{OLD}/output/model", 100, "", NOW - 5),
        StoreEntry(f"artifacts/{OLD}/manifest.json", 10, "", NOW - 9),
        StoreEntry(f"artifacts/{HALF}/checkpoints/step-00000001/manifest.json", 1, "", NOW),
        StoreEntry("artifacts/README", 1, "", 0.0),
        StoreEntry(f"artifacts/{'x' * 64}/output/model", 1, "", 0.0),
        StoreEntry(f"runs/{OLD}/a", 1, "", 0.0),
    ]
    assert group_by_artifact(entries) == {
        OLD: StoredArtifact(OLD, 2, 110, NOW - 5, True),
        HALF: StoredArtifact(HALF, 1, 1, NOW, False),
    }


# -- deletion ----------------------------------------------------------------------------------------------------------


def publish(store: Store, digest: str, *parents: Parent) -> None:
    store.write(f"{output_prefix(digest)}/model", b"weights")
    item = StoredObject(path="model", size=7, sha256="0" * 64)
    manifest = Manifest(
        stage_digest=digest,
        content_digest=content_digest([item]),
        kind="sft",
        objects=(item,),
        parents=parents,
        config={},
        code="test",
        seed=0,
        created=0.0,
    )
    store.write(manifest_key(digest), canonical_json(manifest.model_dump(mode="json")))


def point(store: Store, digest: str, stage: str = "sft") -> None:
    pointer = Pointer(
        stage=stage, kind="sft", stage_digest=digest, content_digest="0" * 64, uri="u", cached=False, recorded=0.0
    )
    store.write(pointer_key("default", "tiny", stage), pointer.model_dump_json().encode())


def parent(digest: str) -> Parent:
    return Parent(key="stage:base", digest="0" * 64, stage_digest=digest, uri="s3://elsewhere")


@pytest.fixture
def filled(store: Store) -> Store:
    """An artifact with a pointer and its parent; two without a pointer; the partial output of an attempt."""
    publish(store, PARENT)
    publish(store, KEPT, parent(PARENT))
    point(store, KEPT)
    publish(store, OLD)
    publish(store, YOUNG)
    store.write(f"{checkpoints_prefix(HALF)}/{checkpoint_name(1)}/manifest.json", b"{}")
    store.write(f"{checkpoints_prefix(HALF)}/{checkpoint_name(1)}/state", b"state")
    return store


def digests_in(store: Store) -> set[str]:
    return {entry.key.split("/")[1] for entry in store.list("artifacts")}


def test_a_store_is_surveyed_with_kinds_sizes_times_and_parents(filled: Store) -> None:
    before = time.time()
    found = survey(filled)
    assert set(found) == {KEPT, PARENT, OLD, YOUNG, HALF}
    assert (found[KEPT].kind, found[KEPT].parents, found[KEPT].num_objects) == ("sft", frozenset({PARENT}), 2)
    assert (found[HALF].kind, found[HALF].is_finished, found[HALF].size) == ("", False, 7)
    assert all(abs(before - item.newest) < 120 for item in found.values())
    assert pointer_targets(filled) == {KEPT}


def test_unneeded_artifacts_are_deleted_entirely_and_others_are_unchanged(filled: Store) -> None:
    kept = {entry.key: filled.read(entry.key) for entry in filled.list() if KEPT in entry.key or PARENT in entry.key}
    found = {digest: replace(item, newest=NOW - 2 * DAY) for digest, item in survey(filled).items()}
    found[YOUNG] = replace(found[YOUNG], newest=NOW - 60)
    garbage = unneeded(found, pointer_targets(filled), NOW - DAY)
    assert {item.digest for item in delete(filled, garbage)} == {OLD, HALF}
    assert digests_in(filled) == {KEPT, PARENT, YOUNG}
    assert {key: filled.read(key) for key in kept} == kept


class RecordingStore:
    """A store that records its deletions."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.deleted: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, prefix: str) -> None:
        self.deleted.append(prefix)
        self._store.delete(prefix)


def test_a_manifest_is_deleted_before_the_rest_of_its_artifact(filled: Store) -> None:
    recording = RecordingStore(filled)
    found = survey(filled)
    list(delete(cast(Store, recording), [found[OLD], found[HALF]]))
    assert recording.deleted == [manifest_key(OLD), f"artifacts/{OLD}", f"artifacts/{HALF}"]


@pytest.mark.parametrize("key", [manifest_key(KEPT), pointer_key("default", "tiny", "sft")])
def test_a_corrupt_manifest_or_pointer_stops_the_collection(filled: Store, key: str) -> None:
    filled.write(key, b"{}")
    with pytest.raises(Corrupt, match=key):
        unneeded(survey(filled), pointer_targets(filled), NOW)


def test_an_input_given_as_an_artifacts_uri_is_a_parent(store: Store) -> None:
    by_uri = Parent(key="uri:x", digest="0" * 64, uri=f"s3://models/x/artifacts/{PARENT}/output")
    outside = Parent(key="uri:y", digest="0" * 64, uri="s3://models/base")
    publish(store, KEPT, by_uri, outside)
    assert survey(store)[KEPT].parents == {PARENT}
    assert parents_of(Manifest.model_validate_json(store.read(manifest_key(KEPT)))) == {PARENT}


@pytest.mark.parametrize(
    ("given_size", "text"), [(812, "812 B"), (12_345, "12.3 kB"), (1.5e9, "1.5 GB"), (2e12, "2 TB")]
)
def test_sizes_are_formatted_for_people(given_size: float, text: str) -> None:
    assert size(given_size) == text


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A folder in which a chain has run twice, the second time with an edit; every file is two days old."""
    monkeypatch.chdir(tmp_path)
    made = Bench(tmp_path)
    made.write(chain())
    made.drive()
    made.drive("stages.base.optimizer.learningRate=0.002")
    age(made)
    return made


def age(bench: Bench, days: float = 2.0) -> None:
    for path in bench.workspace.default_storage.rglob("*"):
        os.utime(path, (time.time() - days * DAY,) * 2)


def artifacts(bench: Bench) -> set[str]:
    return {path.name for path in (bench.workspace.default_storage / "artifacts").iterdir()}


def test_artifacts_from_before_an_edit_are_listed_then_deleted(bench: Bench, cli: Cli) -> None:
    in_use = digests_of_record(bench.record())
    before = artifacts(bench)
    assert (len(before), len(in_use)) == (9, 6)
    code, output = cli("artifacts", "gc")
    assert code == 0
    listed = {word for line in output.splitlines() for word in line.split()[:1] if len(word) == 64 and word[0] != "─"}
    assert listed == before - in_use
    assert "3 of 9 artifacts" in output
    assert "can be deleted; use --delete to delete them" in output
    assert artifacts(bench) == before
    code, output = cli("artifacts", "gc", "--delete")
    assert (code, artifacts(bench)) == (0, in_use)
    assert "nothing to delete among 6 artifacts" in cli("artifacts", "gc", "--delete")[1]
    assert cli("artifacts", "verify", "tiny/release")[0] == 0


def test_recent_artifacts_are_kept(bench: Bench, cli: Cli) -> None:
    age(bench, 0.5)
    assert "nothing to delete" in cli("artifacts", "gc")[1]
    assert "3 of 9 artifacts" in cli("artifacts", "gc", "--older-than", "0.25")[1]


def test_partial_output_of_an_interrupted_local_run_is_kept(bench: Bench, cli: Cli) -> None:
    begun = bench.workspace.default_storage / "artifacts" / HALF / "checkpoints" / "step-00000001" / "state"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"state")
    age(bench)
    folder = bench.workspace.run("default", "tiny")
    record = bench.record()
    stages = {**record.stages, "base": record.stages["base"].model_copy(update={"digest": HALF})}
    folder.save(record.model_copy(update={"stages": stages}))
    cli("artifacts", "gc", "--delete")
    assert HALF in artifacts(bench)


def test_artifacts_of_the_clusters_runs_are_kept_if_the_storage_is_s3(
    filled: Store, cluster: FakeCluster, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    if filled.local_path("") is not None:
        cli("artifacts", "gc", "--storage", filled.uri, "--older-than", "0")
        assert cluster.requests == []  # pods do not see a folder of this machine
        return
    options = ["artifacts", "gc", "--storage", filled.uri, "--endpoint", str(getattr(filled, "endpoint", ""))]
    options += ["--older-than", "0", "--delete"]
    time.sleep(1.1)  # S3's time stamps are in whole seconds
    cluster.add_run(stage_status(digest=HALF), namespace="far-away")
    cluster.refused["GET"] = (403, "you cannot list trainingruns at the cluster scope")
    code, output = cli(*options)
    assert (code, "nothing is deleted" in output, "--no-cluster" in output) == (1, True, True)
    assert digests_in(filled) == {KEPT, PARENT, OLD, YOUNG, HALF}
    assert cli(*[item for item in options if item != "--delete"])[0] == 0
    cluster.refused.clear()
    assert cli(*options)[0] == 0
    assert digests_in(filled) == {KEPT, PARENT, HALF}
    assert cli(*options, "-n", NAMESPACE)[0] == 0  # where that run is not
    assert digests_in(filled) == {KEPT, PARENT}
    cluster.is_installed = False
    assert cli(*options)[0] == 0
