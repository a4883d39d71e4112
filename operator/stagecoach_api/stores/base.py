"""What every back end of the store shares: errors, entries, the protocol, locations, key rules.

StoreError          a store could not do what was asked; names the key
├── NotFound        there is no such object (or bucket, or folder)
├── AccessDenied    no credentials, wrong credentials, or no right
├── Unreachable     the store did not answer, after all retries
└── Corrupt         the bytes are not the ones that were promised
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from stagecoach_api.artifacts import MANIFEST, StoredObject

CHUNK_BYTES = 1 << 20
"""Bytes read at once while copying and hashing."""


class StoreError(Exception):
    """A store could not do what was asked.

    Attributes: `key`, the object or URI it is about; `message`, what happened and what to do. Neither holds a secret.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class NotFound(StoreError):
    """There is no such object."""


class AccessDenied(StoreError):
    """Credentials are missing or wrong, or they do not suffice."""


class Unreachable(StoreError):
    """The store did not answer, or answered with errors of its own, until the retries were used up."""


class Corrupt(StoreError):
    """The bytes are not the ones that were promised."""


@dataclass(frozen=True)
class StoreEntry:
    """One object in a listing."""

    key: str
    """Key relative to the listed root."""

    size: int
    """Bytes."""

    checksum: str
    """`sha256:…` of a local file (only `list_external` computes it; a folder store's own `list` leaves it empty, since
    it would have to read every byte), `etag:…` on S3."""

    modified: float = field(default=0.0, compare=False)
    """When it was written, in seconds since the epoch; 0 where `list_external` does not tell."""


class Store(Protocol):
    """Objects under one URI. Keys are relative to it, with `/` between their parts. Safe to use from several threads.

    Every method may raise `AccessDenied`, `Unreachable` or plain `StoreError` (such as a full disk).
    """

    @property
    def uri(self) -> str:
        """The root, absolute."""

    def list(self, prefix: str = "") -> Iterator[StoreEntry]:
        """Yield the object `prefix` and all objects below the folder `prefix`, sorted by key; nothing if none is."""

    def exists(self, key: str) -> bool:
        """Tell whether there is an object with this key."""

    def read(self, key: str) -> bytes:
        """Return the whole object. Raises NotFound."""

    def write(self, key: str, data: bytes) -> None:
        """Create or replace the object; a reader sees the old bytes or the new ones, never a mixture."""

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object unless it exists. True: this call created it. False: somebody was first."""

    def upload(self, path: Path, key: str) -> StoredObject:
        """Store a file of any size; returns `key` with the size and sha256 of the bytes that were stored."""

    def download(self, key: str, path: Path, expected: StoredObject | None = None) -> None:
        """Write the object to `path`, whole or not at all.

        Raises NotFound, and Corrupt where size or sha256 differ from `expected`.
        """

    def local_path(self, key: str) -> Path | None:
        """Return where the object (or folder) lies on this machine, which need not exist; None for a remote store."""

    def delete(self, prefix: str) -> None:
        """Remove the object `prefix` and all objects below the folder `prefix`, manifests first."""


# -- locations ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S3Location:
    """`s3://bucket/prefix`."""

    bucket: str
    prefix: str
    """Without a slash at either end; empty for the whole bucket."""

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"


@dataclass(frozen=True)
class FolderLocation:
    """A path of this machine."""

    path: Path
    """Absolute."""

    @property
    def uri(self) -> str:
        return file_uri(self.path)


def file_uri(path: Path) -> str:
    """Return a `file://` URI that people can read: only `%`, which would be ambiguous, is escaped."""
    return "file://" + path.as_posix().replace("%", "%25")


def parse_location(uri: str) -> S3Location | FolderLocation:
    """Take apart `s3://bucket/prefix`, `file:///path` (percent-escapes allowed) or a plain path.

    Raises StoreError for any other scheme.
    """
    if uri.startswith("s3://"):
        return _parse_s3(uri)
    if uri.startswith("file://"):
        return _parse_file(uri)
    if "://" in uri:
        scheme = uri.split("://", 1)[0]
        raise StoreError(f"{scheme}://…", "scheme is not supported; use `s3://bucket/prefix`, `file:///path` or a path")
    return FolderLocation(Path(uri).expanduser().absolute())


def _parse_s3(uri: str) -> S3Location:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:  # never repeated in the message: it may be a secret
        raise StoreError("s3://…", "credentials in the URI are not accepted; use the AWS SDK's own configuration")
    if not bucket:
        raise StoreError(uri, "names no bucket; write `s3://bucket/prefix`")
    return S3Location(bucket, prefix.strip("/"))


def _parse_file(uri: str) -> FolderLocation:
    host, slash, path = uri.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not slash:
        raise StoreError(uri, "is not a local path; write `file:///absolute/path`")
    return FolderLocation(Path(unquote("/" + path)))


def public_endpoint(endpoint: str) -> str:
    """Return scheme, host and port of an endpoint: what may be shown in a message."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}:{parts.port}" if parts.port else f"{parts.scheme}://{host}"


# -- keys --------------------------------------------------------------------------------------------------------------


def checked_key(key: str) -> str:
    """Return `key`; raises StoreError where it is empty or could leave the root."""
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(repr(key), "is not a key; a key is a relative path without empty parts, `.` or `..`")
    return key


def checked_prefix(prefix: str) -> str:
    """Return `prefix` without a slash at its end; empty means the root."""
    prefix = prefix.rstrip("/")
    return checked_key(prefix) if prefix else ""


def is_below(key: str, prefix: str) -> bool:
    """Tell whether `key` is `prefix` itself or lies in the folder `prefix`; an empty prefix holds everything."""
    return not prefix or key == prefix or key.startswith(prefix + "/")


def deletion_order(keys: list[str]) -> list[str]:
    """Sort manifests to the front, so that what is half deleted never counts as complete."""
    return sorted(keys, key=lambda key: (key.rsplit("/", 1)[-1] != MANIFEST, key))


# -- bytes -------------------------------------------------------------------------------------------------------------


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_expected(key: str, size: int, sha256: str, expected: StoredObject | None) -> None:
    """Raise Corrupt, naming `key`, unless size and checksum are the promised ones."""
    if expected is None or (size, sha256) == (expected.size, expected.sha256):
        return
    got = f"{size} bytes, sha256 {sha256[:16]}…"
    raise Corrupt(
        key,
        f"bytes differ from the manifest: got {got}, expected {expected.size} bytes, sha256 {expected.sha256[:16]}…; "
        "the object is damaged or was overwritten: make it anew with `stagecoach run --from` the stage that made it",
    )
