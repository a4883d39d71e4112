"""A store in a folder of a POSIX file system.

A write is a temporary file that is renamed, which replaces the target atomically. A commit is a hard link, which fails
if the name exists: rename would overwrite it, and `open("x")` would show a file that is still being written. Both
synchronise the file and its folder, so that a manifest never survives a crash that its objects do not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stagecoach_api.artifacts import StoredObject
from stagecoach_api.stores.base import (
    CHUNK_BYTES,
    AccessDenied,
    FolderLocation,
    InvalidLocation,
    NotFound,
    Stamped,
    StoreEntry,
    StoreError,
    check_expected,
    checked_key,
    checked_prefix,
    deletion_order,
)

TEMPORARY_PREFIX = ".stagecoach-"
TEMPORARY_SUFFIX = ".tmp"
"""Names of files being written. Listings skip them, because a crash may leave some."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A key below a file (ENOTDIR) and that of a folder (EISDIR) do not exist, as on S3, which has no folders.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# While writing: a file where a folder is needed, or the other way round, and names that no folder can have.
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
# EPERM: the file system does not support hard links (link(2)).
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class FolderStore:
    """Objects are files below `location`. See `stagecoach_api.store.Store` for the methods."""

    def __init__(self, location: FolderLocation) -> None:
        self._root = location.path
        self.uri = location.uri

    def __repr__(self) -> str:
        return f"FolderStore({self.uri!r})"

    def list(self, prefix: str = "") -> Iterator[StoreEntry]:
        prefix = checked_prefix(prefix)
        start = self._root / prefix
        with translated(prefix or self.uri):
            if start.is_file():
                paths = [start]
            else:
                paths = [Path(folder) / name for folder, _, names in os.walk(start) for name in names]
            keys = sorted(path.relative_to(self._root).as_posix() for path in paths if not is_temporary(path.name))
        for key in keys:
            # A file may disappear after the walk, as when another run deletes its checkpoints: it is left out.
            with contextlib.suppress(FileNotFoundError):
                stat = (self._root / key).stat()
                yield StoreEntry(key, stat.st_size, "", stat.st_mtime)

    def exists(self, key: str) -> bool:
        with translated(key):
            return self._path(key).is_file()

    def read(self, key: str) -> bytes:
        with translated(key):
            return self._path(key).read_bytes()

    def read_start(self, key: str, num_bytes: int) -> bytes:
        with translated(key), self._path(key).open("rb") as file:
            return file.read(num_bytes)

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with translated(key, path), temporary_file(path) as (temporary, file):
            file.write(data)
            publish(temporary, file, path)

    def commit(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with translated(key, path), temporary_file(path) as (temporary, file):
            file.write(data)
            synchronise(file)
            return _link(temporary, path, key)

    is_exclusive = True

    def read_stamped(self, key: str) -> Stamped:
        path = self._path(key)
        with translated(key), path.open("rb") as file:
            data, modified = file.read(), os.fstat(file.fileno()).st_mtime
        # A new file has the time of the file system, which on a server is not that of this machine.
        with translated(key, path), temporary_file(path) as (temporary, _):
            now = temporary.stat().st_mtime
        return Stamped(data, hashlib.sha256(data).hexdigest(), modified, now)

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        path = self._path(key)
        if not self.exists(key):
            return None
        with translated(key, path), _locked(path):
            try:
                present = path.read_bytes()
            except FileNotFoundError:
                return None
            if hashlib.sha256(present).hexdigest() != tag:
                return None
            self.write(key, data)
        return hashlib.sha256(data).hexdigest()

    def upload(self, path: Path, key: str) -> StoredObject:
        target = self._path(key)
        with translated(key, target), path.open("rb") as source, temporary_file(target) as (temporary, file):
            size, sha256 = copy_hashing(source, file)
            publish(temporary, file, target)
        return StoredObject(path=key, size=size, sha256=sha256)

    def download(self, key: str, path: Path, expected: StoredObject | None = None) -> None:
        with translated(key):
            source = self._path(key).open("rb")
        # Opened first: afterwards ENOENT would be about the target, and not mean that the object does not exist.
        with source, translated(key, path), temporary_file(path) as (temporary, file):
            size, sha256 = copy_hashing(source, file)
            check_expected(key, size, sha256, expected)
            publish(temporary, file, path)

    def local_path(self, key: str) -> Path | None:
        return self._root / checked_prefix(key)

    def delete(self, prefix: str) -> None:
        prefix = checked_key(prefix.rstrip("/"))
        with translated(prefix):
            # Manifests first, an order that `rmtree` alone does not keep. It then removes folders and temporary files.
            for key in deletion_order([entry.key for entry in self.list(prefix)]):
                (self._root / key).unlink(missing_ok=True)
            if (self._root / prefix).is_dir():
                shutil.rmtree(self._root / prefix)

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)


# -- files that appear completely or not at all ------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a new file in `target`'s folder, created if needed. It is deleted at the end unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since neither a rename nor a hard link crosses file systems.
    temporary = target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    try:
        with temporary.open("xb") as file:
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def publish(temporary: Path, file: BinaryIO, target: Path) -> None:
    """Flush `file` to disk and rename it to `target`, replacing any file there."""
    synchronise(file)
    temporary.replace(target)
    _synchronise_folder(target.parent)


def synchronise(file: BinaryIO) -> None:
    """Wait until the file's bytes are on disk: a crash after a manifest was written must not leave empty objects."""
    file.flush()
    os.fsync(file.fileno())


def copy_hashing(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    """Copy all bytes; return their number and SHA-256 (hex)."""
    digest = hashlib.sha256()
    size = 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def _synchronise_folder(folder: Path) -> None:
    """Wait until the folder's entries are on disk: syncing a file does not ensure that of its name (fsync(2))."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(temporary: Path, path: Path, key: str) -> bool:
    """Link the finished file to its name unless the name exists; the file system makes this step exclusive."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_LINKS:
            message = (
                f"the file system of {path.parent} has no hard links, which a store needs to commit; use another one"
            )
            raise InvalidLocation(key, message) from error
        raise
    _synchronise_folder(path.parent)
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock next to `path`. On a file system without locks, nothing is held."""
    with (path.parent / f"{TEMPORARY_PREFIX}{path.name}{TEMPORARY_SUFFIX}").open("ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- errors ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def translated(key: str, path: Path | None = None) -> Iterator[None]:
    """Turn OSError into StoreError with `key`. `path`: the file being written, None while reading."""
    try:
        yield
    except OSError as error:
        raise _store_error(error, key, path) from error


def _store_error(error: OSError, key: str, path: Path | None) -> StoreError:
    where = error.filename or path
    if error.errno in _FULL:
        return StoreError(key, f"no space left ({error.strerror}) for {path}; free some, then run again")
    if error.errno in _DENIED:
        return AccessDenied(key, f"permission denied for {where} ({error.strerror}); check its owner and mode")
    if error.errno in _IN_THE_WAY and path is not None:
        what = f"{_in_the_way(path)} cannot be a folder of the storage ({error.strerror})"
        return InvalidLocation(key, f"{what}; move it away, or use another `storage`")
    # While writing, ENOENT is about the target's folder, and does not mean that an object is missing.
    if error.errno in _ABSENT and path is None:
        return NotFound(key, f"the file {where} does not exist")
    return StoreError(key, f"{error.strerror or error} ({where})")


def _in_the_way(path: Path) -> Path:
    """Return the file that is where a folder of `path` has to be; `path` itself if there is none."""
    with contextlib.suppress(OSError):
        return next((item for item in path.parents if item.is_file()), path)
    return path
