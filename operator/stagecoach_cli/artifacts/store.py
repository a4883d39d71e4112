"""Artifacts in a store: find them by name or digest, download, verify, and trace their lineage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from stagecoach_api.artifacts import (
    Manifest,
    Parent,
    Pointer,
    StoredObject,
    content_digest,
    manifest_key,
    uri_below,
)
from stagecoach_api.store import Corrupt, NotFound, Store, StoreError, external_digest, list_external
from stagecoach_api.stores.base import sha256_of_file
from stagecoach_api.stores.lookup import read_manifest

DIGEST_LENGTH = 64
SHORTEST_PREFIX = 6
PARALLEL_READS = 8


class UnknownArtifact(Exception):
    """No artifact has the given name; the message lists the known ones."""


# -- finding -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunPointer:
    """A pointer and its run."""

    namespace: str
    run: str
    pointer: Pointer

    @property
    def name(self) -> str:
        return f"{self.run}/{self.pointer.stage}"

    @property
    def full_name(self) -> str:
        """`RUN/STAGE`, after its namespace unless that is `default`."""
        return self.name if self.namespace == "default" else f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class ListedArtifact:
    """A pointer and the manifest of its artifact."""

    pointer: RunPointer
    manifest: Manifest | None
    """None if the artifact is deleted."""

    @property
    def num_bytes(self) -> int:
        """Size of its files; 0 if it is deleted."""
        return 0 if self.manifest is None else sum(item.size for item in self.manifest.objects)


def list_all(store: Store, run: str | None = None) -> list[ListedArtifact]:
    """Return the pointers of a run, or of all runs, with their artifacts' manifests, in the order of `pointers`."""

    def read(pointer: RunPointer) -> ListedArtifact:
        try:
            return ListedArtifact(pointer, read_manifest(store, pointer.pointer.stage_digest))
        except NotFound:
            return ListedArtifact(pointer, None)

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        return list(pool.map(read, pointers(store, run)))


def pointers(store: Store, run: str | None = None) -> list[RunPointer]:
    """Return the pointers of all runs, or of the run called `RUN` or `NAMESPACE/RUN`; of each run the oldest first."""
    found = []
    for entry in store.list("runs"):
        parts = entry.key.split("/")
        if len(parts) != 4 or not parts[3].endswith(".json"):
            continue
        if run is None or run in (parts[2], f"{parts[1]}/{parts[2]}"):
            found.append(RunPointer(parts[1], parts[2], _read_pointer(store, entry.key)))
    return sorted(found, key=lambda item: (item.namespace, item.run, item.pointer.recorded))


def _read_pointer(store: Store, key: str) -> Pointer:
    try:
        return Pointer.model_validate_json(store.read(key))
    except ValidationError as error:
        raise Corrupt(
            key, "is not a valid pointer; delete it, then run the stage's file again to rewrite it"
        ) from error


def split_uri(uri: str) -> tuple[str, str] | None:
    """Split `…/artifacts/<digest>[/…]` into storage URI and stage digest; None if it is not an artifact's URI."""
    root, _, rest = uri.rstrip("/").rpartition("/artifacts/")
    digest = rest.split("/")[0]
    if not root or len(digest) != DIGEST_LENGTH:
        return None
    return root, digest


def find(store: Store, name: str) -> str:
    """Return the stage digest for `RUN/STAGE`, `NAMESPACE/RUN/STAGE`, a digest or a digest's prefix.

    Raises UnknownArtifact, also if the name is ambiguous.
    """
    if len(name) == DIGEST_LENGTH and "/" not in name:
        return name
    all_pointers = pointers(store)
    if "/" in name:
        digests = {
            item.pointer.stage_digest for item in all_pointers if name in (item.name, f"{item.namespace}/{item.name}")
        }
    else:
        prefix = name if len(name) >= SHORTEST_PREFIX else "-"  # "-": matches no digest
        digests = {item.pointer.stage_digest for item in all_pointers if item.pointer.stage_digest.startswith(prefix)}
    if len(digests) == 1:
        return digests.pop()
    known = ", ".join(item.name for item in all_pointers) or "none"
    if digests:
        raise UnknownArtifact(f"`{name}` matches {len(digests)} artifacts; give NAMESPACE/RUN/STAGE or more digits")
    raise UnknownArtifact(f"no artifact `{name}` in {store.uri}; give RUN/STAGE or a digest. Known artifacts: {known}")


# -- downloading -------------------------------------------------------------------------------------------------------


def fetch(store: Store, digest: str, folder: Path) -> Iterator[tuple[StoredObject, Path]]:
    """Download an artifact's output into `folder`; yield each object when it is downloaded and verified.

    Raises NotFound, Corrupt if an object differs from the manifest, and FileExistsError if the folder is not empty.
    """
    manifest = read_manifest(store, digest)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another one")
    for item in manifest.objects:
        target = folder / item.path
        store.download(f"{manifest.folder}/{item.path}", target, item)
        yield item, target


# -- lineage -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ancestor:
    """A node of a lineage: an artifact or an external input."""

    key: str
    """Its key in the manifest that reads it, `stage:NAME` or `uri:URI`; for the root, the requested name."""
    digest: str
    """Content digest."""
    uri: str
    stage_digest: str | None = None
    """None for an external input."""
    manifest: Manifest | None = None
    """None for an external input, and if the manifest is missing."""
    parents: tuple[Ancestor, ...] = ()


def lineage(store: Store, digest: str, name: str) -> Ancestor:
    """Return an artifact with all its ancestors. Raises NotFound if the artifact itself is missing."""
    manifest = read_manifest(store, digest)
    return Ancestor(
        key=name,
        digest=manifest.content_digest,
        uri=uri_below(store.uri, manifest.folder),
        stage_digest=digest,
        manifest=manifest,
        parents=tuple(_ancestor(store, parent) for parent in manifest.parents),
    )


def _ancestor(store: Store, parent: Parent) -> Ancestor:
    if parent.stage_digest is None:
        return Ancestor(parent.key, parent.digest, parent.uri)
    try:
        return lineage(store, parent.stage_digest, parent.key)
    except NotFound:
        return Ancestor(parent.key, parent.digest, parent.uri, parent.stage_digest)


def flatten(root: Ancestor) -> list[Ancestor]:
    """Return each node of a lineage once, ancestors first."""
    found: dict[str, Ancestor] = {}

    def visit(item: Ancestor) -> None:
        for parent in item.parents:
            visit(parent)
        found.setdefault(item.stage_digest or f"{item.uri} {item.digest}", item)

    visit(root)
    return list(found.values())


# -- verifying ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerifyResult:
    """The result of verifying one node of a lineage."""

    member: Ancestor
    num_objects: int
    num_bytes: int
    faults: tuple[str, ...] = ()
    """Errors, each with the object's key."""
    notes: tuple[str, ...] = ()
    """Objects that could not be checked, or that are unexpected but harmless."""


@dataclass
class _Tally:
    num_objects: int = 0
    num_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    store: Store, digest: str, name: str, endpoint: str | None = None, region: str | None = None
) -> Iterator[VerifyResult]:
    """Hash every object of an artifact's lineage again; yield the result for each node.

    `endpoint`, `region`: of S3, for external inputs.
    """
    for member in flatten(lineage(store, digest, name)):
        tally = _Tally()
        if member.stage_digest is None:
            _verify_external(member, tally, endpoint, region)
        elif member.manifest is None:
            tally.faults.append(f"{manifest_key(member.stage_digest)}: the manifest is missing")
        else:
            _verify_artifact(store, member.stage_digest, member.manifest, tally)
        yield VerifyResult(member, tally.num_objects, tally.num_bytes, tuple(tally.faults), tuple(tally.notes))


def _verify_artifact(store: Store, digest: str, manifest: Manifest, tally: _Tally) -> None:
    prefix = manifest.folder
    if manifest.stage_digest != digest:
        tally.faults.append(f"{manifest_key(digest)}: contains another stage digest, {manifest.stage_digest}")
    if content_digest(manifest.objects) != manifest.content_digest:
        tally.faults.append(f"{manifest_key(digest)}: its content digest does not match the objects it lists")
    for item in manifest.objects:
        tally.num_objects += 1
        tally.num_bytes += item.size
        fault = _fault(store, f"{prefix}/{item.path}", item)
        if fault:
            tally.faults.append(fault)
    listed = {f"{prefix}/{item.path}" for item in manifest.objects}
    extra = [entry.key for entry in store.list(prefix) if entry.key not in listed]
    tally.notes.extend(f"{key}: is not in the manifest" for key in extra)


def _fault(store: Store, key: str, expected: StoredObject) -> str:
    """Return an error for an object that differs from `expected`, empty if it does not."""
    local = store.local_path(key)
    try:
        if local is None:
            with tempfile.TemporaryDirectory() as folder:
                store.download(key, Path(folder) / "object", expected)
            return ""
        return _difference(key, local, expected)
    except Corrupt as error:
        return str(error)
    except (NotFound, FileNotFoundError):
        return f"{key}: is missing"


def _difference(key: str, path: Path, expected: StoredObject) -> str:
    size = path.stat().st_size
    if size != expected.size:
        return f"{key}: has {size} bytes, expected {expected.size}"
    sha256 = sha256_of_file(path)
    if sha256 != expected.sha256:
        return f"{key}: its bytes have changed: sha256 {sha256[:16]}…, expected {expected.sha256[:16]}…"
    return ""


def _verify_external(member: Ancestor, tally: _Tally, endpoint: str | None, region: str | None) -> None:
    try:
        _, entries = list_external(member.uri, endpoint, region)
    except NotFound:
        tally.notes.append(f"{member.uri}: not checked, the input no longer exists")
        return
    except StoreError as error:
        tally.notes.append(f"{error}; not checked")
        return
    tally.num_objects = len(entries)
    tally.num_bytes = sum(entry.size for entry in entries)
    if external_digest(entries) != member.digest:
        tally.faults.append(f"{member.uri}: has changed since it was read")
