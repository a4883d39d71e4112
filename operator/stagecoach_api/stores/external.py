"""External inputs: a file, a folder or a glob, on this machine or on S3, and the digest of their content."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from stagecoach_api.artifacts import digest_of
from stagecoach_api.stores.base import (
    FolderLocation,
    NotFound,
    S3Location,
    StoreEntry,
    file_uri,
    parse_location,
    sha256_of_file,
)
from stagecoach_api.stores.folder import translated
from stagecoach_api.stores.s3 import S3Store

_HASHING_THREADS = 4
_WILDCARDS = frozenset("*?[")


def list_external(
    uri: str,
    endpoint: str | None = None,
    region: str | None = None,
    hash_file: Callable[[Path], str] = sha256_of_file,
) -> tuple[str, list[StoreEntry]]:
    """List the files at `uri`: a file, a folder (everything below it) or a glob (`*`, `?`, `[…]`, `**` for any depth).

    Returns the root's URI and the files with keys relative to it, sorted. The root of a single file is its folder, that
    of a glob the last folder without a wildcard. Hidden files are skipped unless a pattern names them. The checksum
    of a local file is its SHA-256, computed by `hash_file` (a caller may cache hashes); that of an S3 object its ETag.
    Raises NotFound, with `uri`, if there is nothing.
    """
    location = parse_location(uri)
    if isinstance(location, FolderLocation):
        root, entries = _list_local(location.path, hash_file)
        found = file_uri(root), entries
    else:
        found = _list_s3(location, endpoint, region)
    if not found[1]:
        raise NotFound(
            uri, "there is no such file, non-empty folder, or match; check the path (hidden files are skipped)"
        )
    return found


def external_digest(entries: Iterable[StoreEntry]) -> str:
    """Return the digest of an external input: keys below its root, sizes and checksums, in any order."""
    return digest_of(sorted([entry.key, entry.size, entry.checksum] for entry in entries))


# -- this machine ------------------------------------------------------------------------------------------------------


def _list_local(path: Path, hash_file: Callable[[Path], str]) -> tuple[Path, list[StoreEntry]]:
    with translated(str(path)):
        if path.is_file():
            return path.parent, _hashed(path.parent, [path.name], hash_file)
        if path.is_dir():
            return path, _hashed(path, [key for key in _walk(path) if not _is_hidden(key)], hash_file)
        root, pattern = _split_glob(PurePosixPath(path.as_posix()).parts)
        folder = Path(*root)
        if not pattern or not folder.is_dir():
            return folder, []
        # Without `**` no file deeper than the pattern can match, so large trees below are not walked.
        deep = "**" in pattern
        keys = _walk(folder, None if deep else len(pattern))
        matching = [key for key in keys if _matches(tuple(key.split("/")), pattern)]
        return folder, _hashed(folder, matching, hash_file)


def _walk(folder: Path, depth: int | None = None, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Yield the files below `folder`, at most `depth` levels down. Follows links to folders, but no cycle of them."""
    real = folder.resolve()
    if real in seen or depth == 0:
        return
    below = None if depth is None else depth - 1
    for path in folder.iterdir():
        if path.is_dir():
            yield from (f"{path.name}/{key}" for key in _walk(path, below, seen | {real}))
        else:
            yield path.name


def _hashed(root: Path, keys: list[str], hash_file: Callable[[Path], str]) -> list[StoreEntry]:
    """Hash the files, several at a time (hashing releases the GIL)."""

    def entry(key: str) -> StoreEntry:
        path = root / key
        return StoreEntry(key, path.stat().st_size, "sha256:" + hash_file(path))

    with ThreadPoolExecutor(_HASHING_THREADS, thread_name_prefix="hash") as pool:
        return list(pool.map(entry, sorted(keys)))


# -- S3 ----------------------------------------------------------------------------------------------------------------


def _list_s3(location: S3Location, endpoint: str | None, region: str | None) -> tuple[str, list[StoreEntry]]:
    parts = tuple(location.prefix.split("/")) if location.prefix else ()
    root, pattern = _split_glob(parts)
    if pattern:
        folder = S3Location(location.bucket, "/".join(root))
        # List only keys that start as the pattern does: a bucket may have millions of others.
        literal = pattern[0][: next(index for index, letter in enumerate(pattern[0]) if letter in _WILDCARDS)]
        store = S3Store(folder, endpoint, region)
        found = [entry for entry in store.list_raw(literal) if _matches(tuple(entry.key.split("/")), pattern)]
        return folder.uri, sorted(found, key=lambda entry: entry.key)
    # S3 has no folders: the URI is a prefix of keys, or else the key of a single object.
    below = [entry for entry in S3Store(location, endpoint, region).list() if not _is_hidden(entry.key)]
    if below or not parts:
        return location.uri, below
    folder = S3Location(location.bucket, "/".join(parts[:-1]))
    return folder.uri, [entry for entry in S3Store(folder, endpoint, region).list(parts[-1]) if entry.key == parts[-1]]


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
