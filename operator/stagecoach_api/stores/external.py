"""External inputs: a file, a folder or a glob, on this machine or on S3, and the digest of their content."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from stagecoach_api.artifacts import digest_of
from stagecoach_api.stores.base import (
    FolderLocation,
    NotFound,
    S3Location,
    StoreEntry,
    StoreError,
    file_uri,
    parse_location,
    sha256_of_file,
)
from stagecoach_api.stores.folder import translated
from stagecoach_api.stores.retry import TRANSFERS, StorePatience
from stagecoach_api.stores.s3 import S3Store

_HASHING_THREADS = 4
_WILDCARDS = frozenset("*?[")


def list_external(
    uri: str,
    endpoint: str | None = None,
    region: str | None = None,
    hash_file: Callable[[Path], str] = sha256_of_file,
    patience: StorePatience = TRANSFERS,
) -> tuple[str, list[StoreEntry]]:
    """List the files at `uri`: a file, a folder (everything below it) or a glob (`*`, `?`, `[…]`, `**` for any depth).

    A URI is looked for as a name first, so that a file called `what?.jsonl` is that file and no pattern.
    Returns the root's URI and the files with keys relative to it, sorted. The root of a single file is its folder, that
    of a glob the last folder without a wildcard. Hidden files are skipped unless a pattern names them. The checksum
    of a local file is its SHA-256, computed by `hash_file` (a caller may cache hashes); that of an S3 object its ETag.
    `patience`: how long S3 is waited for. Raises NotFound, with `uri`, if there is nothing.
    """
    location = parse_location(uri)
    if isinstance(location, FolderLocation):
        with translated(str(location.path)):
            root, entries = _found(_LocalTree(hash_file), PurePosixPath(location.path.as_posix()).parts)
        found = file_uri(Path(*root)), entries
    else:
        parts = tuple(location.prefix.split("/")) if location.prefix else ()
        root, entries = _found(_Bucket(location.bucket, endpoint, region, patience), parts)
        found = S3Location(location.bucket, "/".join(root)).uri, entries
    if not found[1]:
        raise NotFound(
            uri, "there is no such file, non-empty folder, or match; check the path (hidden files are skipped)"
        )
    return found


def local_files(path: Path) -> tuple[Path, list[str]]:
    """Return the folder and the keys that `list_external` finds for a local path, without reading any file.

    The list is empty if there is nothing.
    """
    with translated(str(path)):
        root, keys = _matching(_LocalTree(sha256_of_file), PurePosixPath(path.as_posix()).parts)
    return Path(*root), keys


def external_digest(entries: Iterable[StoreEntry]) -> str:
    """Return the digest of an external input: keys below its root, sizes and checksums, in any order."""
    return digest_of(sorted([entry.key, entry.size, entry.checksum] for entry in entries))


# -- a file, a folder, a glob ------------------------------------------------------------------------------------------

Parts = tuple[str, ...]
"""A path, split at its slashes."""


class _Tree(Protocol):
    """Files below a root, on this machine or in a bucket."""

    def at(self, parts: Parts) -> tuple[Parts, list[str]]:
        """Return the file at a path, as its folder and its name, or the folder and all keys below it."""

    def below(self, root: Parts, pattern: Parts) -> Iterable[str]:
        """Return at least the keys below a folder that match a pattern."""

    def entries(self, root: Parts, keys: Sequence[str]) -> list[StoreEntry]:
        """Return the entries of the files with these keys."""


def _found(tree: _Tree, parts: Parts) -> tuple[Parts, list[StoreEntry]]:
    root, keys = _matching(tree, parts)
    return root, tree.entries(root, keys)


def _matching(tree: _Tree, parts: Parts) -> tuple[Parts, list[str]]:
    """Return the root and the sorted keys of the files at a path, which is read as a pattern only if it is no name."""
    root, keys = tree.at(parts)
    if keys:
        return root, sorted(keys)
    root, pattern = _split_glob(parts)
    if not pattern:
        return root, []
    return root, sorted(key for key in tree.below(root, pattern) if _matches(tuple(key.split("/")), pattern))


# -- this machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LocalTree:
    hash_file: Callable[[Path], str]

    def at(self, parts: Parts) -> tuple[Parts, list[str]]:
        path = Path(*parts)
        if path.is_file():
            return parts[:-1], [path.name]
        return parts, [key for key in walk(path) if not _is_hidden(key)] if path.is_dir() else []

    def below(self, root: Parts, pattern: Parts) -> Iterable[str]:
        folder = Path(*root)
        # Without `**` no file deeper than the pattern can match, so large trees below are not walked.
        return walk(folder, None if "**" in pattern else len(pattern)) if folder.is_dir() else ()

    def entries(self, root: Parts, keys: Sequence[str]) -> list[StoreEntry]:
        """Hash the files, several at a time (hashing releases the GIL)."""
        folder = Path(*root)

        def entry(key: str) -> StoreEntry:
            path = folder / key
            if not path.exists():
                raise NotFound(str(path), "it links to a file that does not exist; restore it, or remove the link")
            return StoreEntry(key, path.stat().st_size, "sha256:" + self.hash_file(path))

        with ThreadPoolExecutor(_HASHING_THREADS, thread_name_prefix="hash") as pool:
            return list(pool.map(entry, keys))


def walk(folder: Path, depth: int | None = None, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Yield the files below `folder`, at most `depth` levels down. Follows links to folders, but no cycle of them."""
    real = folder.resolve()
    if real in seen or depth == 0:
        return
    below = None if depth is None else depth - 1
    for path in folder.iterdir():
        if path.is_dir():
            yield from (f"{path.name}/{key}" for key in walk(path, below, seen | {real}))
        else:
            yield path.name


# -- S3 ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Bucket:
    bucket: str
    endpoint: str | None
    region: str | None
    patience: StorePatience
    _listed: dict[str, StoreEntry] = field(default_factory=dict)
    """Entries of the latest listing by key: S3 gives size and checksum with the keys."""
    _began: float = field(default_factory=time.monotonic)

    def at(self, parts: Parts) -> tuple[Parts, list[str]]:
        # S3 has no folders: the URI is a prefix of keys, or else the key of a single object.
        below = [key for key in self._keys(self._store(parts).list_raw("")) if not _is_hidden(key)]
        if below or not parts:
            return parts, below
        return parts[:-1], [key for key in self._keys(self._store(parts[:-1]).list_raw(parts[-1])) if key == parts[-1]]

    def below(self, root: Parts, pattern: Parts) -> Iterable[str]:
        # List only keys that start as the pattern does: a bucket may have millions of others.
        literal = pattern[0][: next(index for index, letter in enumerate(pattern[0]) if letter in _WILDCARDS)]
        return self._keys(self._store(root).list_raw(literal))

    def entries(self, root: Parts, keys: Sequence[str]) -> list[StoreEntry]:
        return [self._listed[key] for key in keys]

    def _store(self, parts: Parts) -> S3Store:
        return S3Store(S3Location(self.bucket, "/".join(parts)), self.endpoint, self.region, patience=self.patience)

    def _keys(self, entries: Iterable[StoreEntry]) -> list[str]:
        self._listed = {}
        limit = self.patience.listing_seconds
        for entry in entries:
            self._listed[entry.key] = entry
            if limit is not None and time.monotonic() - self._began > limit:
                count = len(self._listed)
                raise StoreError(entry.key, f"its list takes more than {limit:.0f} s (until now: {count:,} objects)")
        return list(self._listed)


# -- globs -------------------------------------------------------------------------------------------------------------


def _split_glob(parts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split a path into the folders before its first wildcard, and the pattern from there on (empty: no wildcard)."""
    for index, part in enumerate(parts):
        if _WILDCARDS & set(part):
            return parts[:index], parts[index:]
    return parts, ()


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Match part by part, as shells do: a leading dot only by a leading dot, `**` by any number of folders, even 0."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 1:  # `data/**`: everything below
            return bool(parts) and not _is_hidden("/".join(parts))
        skips = next((index for index, part in enumerate(parts) if part.startswith(".")), len(parts))
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(skips + 1))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))
