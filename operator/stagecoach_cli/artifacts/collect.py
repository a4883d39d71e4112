"""Garbage collection of artifacts: mark the needed ones, delete the others.

An artifact is needed if a pointer (`runs/**` in the store) or a run names it, if it is recent, or if a needed artifact
was made from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from stagecoach_api.artifacts import Manifest, artifact_prefix, manifest_key
from stagecoach_api.store import NotFound, Store, StoreEntry
from stagecoach_api.stores.lookup import read_manifest
from stagecoach_cli.artifacts.store import DIGEST_LENGTH, pointers, split_uri
from stagecoach_local.workspace import RunRecord

READ_THREADS = 8
ARTIFACTS = "artifacts"


@dataclass(frozen=True)
class StoredArtifact:
    """One artifact of a store: finished, or the partial output of attempts."""

    digest: str
    """Stage digest."""
    num_objects: int
    size: int
    """Bytes of all its objects, checkpoints and logs included."""
    newest: float
    """When its newest object was written, in seconds since the epoch."""
    is_finished: bool
    """Whether it has a manifest."""
    kind: str = ""
    """Stage kind; empty if it has no manifest."""
    parents: frozenset[str] = frozenset()
    """Stage digests of the artifacts it was made from."""


# -- pure --------------------------------------------------------------------------------------------------------------


def unneeded(artifacts: Mapping[str, StoredArtifact], roots: Iterable[str], young_since: float) -> list[StoredArtifact]:
    """Return the artifacts that nothing needs, the oldest first.

    `roots`: stage digests in use. `young_since`: seconds since the epoch; an artifact with an object written later is
    needed, since an attempt may be writing it.
    """
    young = {item.digest for item in artifacts.values() if item.newest > young_since}
    needed = reachable(artifacts, young | set(roots))
    return sorted(
        (item for item in artifacts.values() if item.digest not in needed), key=lambda item: (item.newest, item.digest)
    )


def reachable(artifacts: Mapping[str, StoredArtifact], roots: Iterable[str]) -> set[str]:
    """Return the roots and all their ancestors."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        digest = waiting.pop()
        if digest not in found:
            found.add(digest)
            artifact = artifacts.get(digest)
            waiting += artifact.parents if artifact is not None else ()
    return found


def group_by_artifact(entries: Iterable[StoreEntry]) -> dict[str, StoredArtifact]:
    """Return the artifacts of a listing, without kinds and parents. Objects that belong to no artifact are ignored."""
    found: dict[str, StoredArtifact] = {}
    for entry in entries:
        root, _, rest = entry.key.partition("/")
        digest, slash, _ = rest.partition("/")
        if root != ARTIFACTS or not slash or not is_digest(digest):
            continue
        artifact = found.get(digest, StoredArtifact(digest, 0, 0, 0.0, False))
        found[digest] = replace(
            artifact,
            num_objects=artifact.num_objects + 1,
            size=artifact.size + entry.size,
            newest=max(artifact.newest, entry.modified),
            is_finished=artifact.is_finished or entry.key == manifest_key(digest),
        )
    return found


def is_digest(text: str) -> bool:
    return len(text) == DIGEST_LENGTH and set(text) <= set("0123456789abcdef")


def parents_of(manifest: Manifest) -> frozenset[str]:
    """Return the stage digests of an artifact's parents, including inputs that are given by an artifact's URI."""
    named = {parent.stage_digest for parent in manifest.parents if parent.stage_digest is not None}
    by_uri = {parts[1] for parent in manifest.parents if (parts := split_uri(parent.uri)) is not None}
    return frozenset(named | by_uri)


def digests_of_record(record: RunRecord) -> set[str]:
    """Return the stage digests that a run of this folder uses: of its stages, and of its live attempts."""
    stages = {stage.digest for stage in record.stages.values() if stage.digest is not None}
    return stages | {attempt.digest for attempt in record.attempts if attempt.ended is None}


# -- the store ---------------------------------------------------------------------------------------------------------


def survey(store: Store) -> dict[str, StoredArtifact]:
    """List every artifact of a store, and read every manifest.

    Raises Corrupt if a manifest cannot be parsed: its parents are unknown then, so nothing may be deleted.
    """
    found = group_by_artifact(store.list(ARTIFACTS))

    def read(item: StoredArtifact) -> StoredArtifact:
        if not item.is_finished:
            return item
        try:
            manifest = read_manifest(store, item.digest)
        except NotFound:  # deleted by another process since the listing
            return replace(item, is_finished=False)
        return replace(item, kind=manifest.kind, parents=parents_of(manifest))

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="manifests") as pool:
        return {item.digest: item for item in pool.map(read, found.values())}


def pointer_targets(store: Store) -> set[str]:
    """Return the stage digests that pointers name. Raises Corrupt if a pointer cannot be parsed."""
    return {item.pointer.stage_digest for item in pointers(store)}


def delete(store: Store, artifacts: Iterable[StoredArtifact]) -> Iterator[StoredArtifact]:
    """Delete artifacts and yield each when it is deleted.

    The manifest is deleted first: an interrupted deletion must not leave a manifest without its objects.
    """
    for item in artifacts:
        if item.is_finished:
            store.delete(manifest_key(item.digest))
        store.delete(artifact_prefix(item.digest))
        yield item
