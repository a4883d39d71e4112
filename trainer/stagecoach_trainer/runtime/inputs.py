"""Inputs of a stage as local paths: artifacts, checked byte by byte against their manifest, and external files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from stagecoach_api.artifacts import Manifest, ResolvedInput, StoredObject, content_digest, manifest_key, storage_of
from stagecoach_api.store import Corrupt, Store, StoreEntry, external_digest, list_external, open_store
from stagecoach_api.stores.base import FolderLocation, check_expected, parse_location, sha256_of_file
from stagecoach_api.stores.external import local_files
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.runtime.sealed import Damaged, read_sealed, require_sha256, warn_of_damage, write_sealed

PARALLEL_TRANSFERS = 8


def fetch_input(
    found: ResolvedInput, store: Store, cache: Path, endpoint: str | None = None, region: str | None = None
) -> Path:
    """Return a local folder (or, for a single external file, that file) with the input's content.

    An artifact in a folder store is read in place; one on S3 is downloaded once to `cache/inputs/<digest>`. Either way
    each object's sha256 is compared with the manifest. External inputs must be unchanged since the run was planned.
    `endpoint`, `region`: of the S3 service of external inputs; None for the store's.

    Raises Corrupt naming the object whose bytes differ, NotFound, and UserError for an external input that has changed.
    """
    if found.stage_digest is not None:
        return _fetch_artifact(found, found.stage_digest, store, cache)
    endpoint = endpoint or getattr(store, "endpoint", None)
    return _fetch_external(found, cache, endpoint, region or getattr(store, "region", None))


def input_files(path: Path) -> list[Path]:
    """Return `path` itself if it is a file, else all files below it, sorted, except hidden ones."""
    if path.is_file():
        return [path]
    root, keys = local_files(path)
    return [root / key for key in keys]


# -- artifacts ---------------------------------------------------------------------------------------------------------


def read_manifest(found: ResolvedInput, stage_digest: str, store: Store) -> Manifest:
    """Return the manifest of an input artifact. Raises Corrupt unless it is the one the stage was planned with."""
    key = manifest_key(stage_digest)
    manifest = Manifest.model_validate_json(store.read(key))
    digest = content_digest(manifest.objects)
    if digest != manifest.content_digest:
        raise Corrupt(key, "the manifest does not match its own content digest: it was edited or damaged")
    if digest != found.digest:
        raise Corrupt(
            key,
            f"the artifact is not the one this stage was planned with (content {digest[:12]}…, planned "
            f"{found.digest[:12]}…): plan the run again",
        )
    return manifest


def _fetch_artifact(found: ResolvedInput, stage_digest: str, store: Store, cache: Path) -> Path:
    store = _store_of(found, stage_digest, store)
    manifest = read_manifest(found, stage_digest, store)
    prefix = manifest.folder
    in_place = store.local_path(prefix)
    if in_place is not None:
        _verify(in_place, prefix, manifest.objects)
        return in_place
    folder = cache / "inputs" / found.digest
    with _locked(cache, found.digest):
        _download_objects(store, prefix, manifest.objects, folder)
    return folder


def _store_of(found: ResolvedInput, stage_digest: str, store: Store) -> Store:
    """Return the store that contains an artifact: the run's own, or the one that the artifact's URI names."""
    root = storage_of(found.uri, stage_digest)
    if root is None or root == store.uri.rstrip("/"):
        return store
    return open_store(root, endpoint=getattr(store, "endpoint", None), region=getattr(store, "region", None))


def _verify(folder: Path, prefix: str, objects: Sequence[StoredObject]) -> None:
    for item in objects:
        path = folder / item.path
        if not path.is_file():
            raise Corrupt(f"{prefix}/{item.path}", "the manifest names this object, but it is missing")
        check_expected(f"{prefix}/{item.path}", path.stat().st_size, sha256_of_file(path), item)


def _download_objects(store: Store, prefix: str, objects: Sequence[StoredObject], folder: Path) -> None:
    def download(item: StoredObject) -> None:
        path = folder / item.path
        if path.is_file() and path.stat().st_size == item.size and sha256_of_file(path) == item.sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        store.download(f"{prefix}/{item.path}", path, item)

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        list(pool.map(download, objects))


# -- external files ----------------------------------------------------------------------------------------------------


def _fetch_external(found: ResolvedInput, cache: Path, endpoint: str | None, region: str | None) -> Path:
    root, entries = list_external(found.uri, endpoint, region)
    digest = external_digest(entries)
    if digest != found.digest:
        raise UserError(
            f"{found.uri}: the input has changed since this stage was planned (content {digest[:12]}…, planned "
            f"{found.digest[:12]}…); run it again, which plans it again"
        )
    location = parse_location(found.uri)
    if isinstance(location, FolderLocation) and location.path.exists():
        return location.path
    folder = cache / "inputs" / found.digest
    with _locked(cache, found.digest):
        _gather(entries, folder, open_store(root, endpoint, region))
    # The URI is the name of a single object, or else that of a folder, or a pattern.
    is_file = found.uri.rstrip("/") == f"{root.rstrip('/')}/{entries[0].key}"
    return folder / entries[0].key if is_file else folder


def _gather(entries: Sequence[StoreEntry], folder: Path, source: Store) -> None:
    """Put exactly the listed files into `folder`: as links to local files, or downloaded from S3."""
    location = parse_location(source.uri)

    def fetch(entry: StoreEntry) -> None:
        path = folder / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(location, FolderLocation):
            path.unlink(missing_ok=True)
            path.symlink_to(location.path / entry.key)
        elif not _is_intact(path, entry.size):
            source.download(entry.key, path)
            write_sealed(_seal_of(path), sha256_of_file(path).encode())

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        list(pool.map(fetch, entries))


def _seal_of(path: Path) -> Path:
    """Return the hidden file, next to a downloaded one, with its SHA-256: S3's own checksum may be of another kind."""
    return path.with_name(f".{path.name}.sha256")


def _is_intact(path: Path, size: int) -> bool:
    """Return whether an earlier download is complete and unchanged. A changed one is logged."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    written = read_sealed(_seal_of(path))
    if written is None:
        return False
    try:
        require_sha256(path, written.decode())
    except Damaged as error:
        warn_of_damage(path, error)
        return False
    return True


@contextmanager
def _locked(cache: Path, digest: str) -> Iterator[None]:
    """Hold a lock so that one process of this machine at a time fills the folder of an input."""
    folder = cache / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / f"{digest}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
