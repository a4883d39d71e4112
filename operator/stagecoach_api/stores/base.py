"""What all store back ends share: errors, entries, the protocol, locations, rules for keys.

StoreError          an operation failed; has the key
├── NotFound        there is no such object (or bucket, or folder)
├── AccessDenied    credentials are missing, wrong or lack a permission
├── Unreachable     the store did not answer, or kept failing, after all retries
├── InvalidLocation the URI, the endpoint or what is at that place cannot be a store
└── Corrupt         the bytes differ from the expected ones
    └── Replaced    another process wrote the object while it was read
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
"""Bytes per read while copying and hashing."""


class StoreError(Exception):
    """An operation on a store failed.

    Attributes: `key`, the object or URI concerned; `message`, what happened and what to do. Neither contains a secret.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class NotFound(StoreError):
    """There is no such object."""


class AccessDenied(StoreError):
    """Credentials are missing, wrong or lack a permission."""


class Unreachable(StoreError):
    """The store did not answer, or answered with server errors, until the retries were used up."""


class InvalidLocation(StoreError):
    """The URI, the endpoint or what is at that place cannot be a store, so no retry can help."""


class Corrupt(StoreError):
    """The bytes differ from the expected ones, or a manifest is invalid."""


class Replaced(Corrupt):
    """Another process wrote the object while it was read; neither version is known to be damaged."""


@dataclass(frozen=True)
class StoreEntry:
    """One object in a listing."""

    key: str
    """Key relative to the listed root."""

    size: int
    """Bytes."""

    checksum: str
    """`sha256:…` of a local file , `etag:…` on S3. Only `list_external` computes the former; `list` of a folder store
    leaves it empty, because it would have to read every byte."""

    modified: float = field(default=0.0, compare=False)
    """When it was last written, in seconds since the epoch; 0 in listings of local files by `list_external`."""


@dataclass(frozen=True)
class Stamped:
    """An object with its version and times. Both times are the store's: clocks of machines differ."""

    data: bytes
    tag: str
    """Identifies this version of the object."""
    modified: float
    """When it was written, in seconds since the epoch."""
    now: float
    """When the store answered, in seconds since the epoch."""


class Store(Protocol):
    """Objects under one URI. Keys are relative to it, with `/` between their parts. Safe to use from several threads.

    Every method may raise `AccessDenied`, `Unreachable` or plain `StoreError` (such as a full disk).
    """

    @property
    def uri(self) -> str:
        """The root, absolute."""

    def list(self, prefix: str = "") -> Iterator[StoreEntry]:
        """Yield the object `prefix` and all objects below the folder `prefix`, sorted by key."""

    def exists(self, key: str) -> bool:
        """Return whether an object with this key exists."""

    def read(self, key: str) -> bytes:
        """Return the whole object. Raises NotFound."""

    def read_start(self, key: str, num_bytes: int) -> bytes:
        """Return an object's first `num_bytes`, or all of it if it has fewer; unverified. Raises NotFound."""

    def write(self, key: str, data: bytes) -> None:
        """Create or replace the object; a reader sees either the old or the new bytes, never a mixture."""

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object unless it exists. Returns True if this call created it, False if it existed already."""

    def read_stamped(self, key: str) -> Stamped:
        """Return the whole object with its version and the store's time. Raises NotFound."""

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Replace the object if it is still the version `tag`; return the new version, None if it is another one."""

    @property
    def is_exclusive(self) -> bool:
        """Whether `commit` and `replace` exclude other writers, as far as known. If not, they look and then write, and
        of two writers at the same moment the later one counts."""

    def upload(self, path: Path, key: str) -> StoredObject:
        """Store a file of any size. Returns `key` with the size and SHA-256 of the stored bytes."""

    def download(self, key: str, path: Path, expected: StoredObject | None = None) -> None:
        """Write the object to `path`, completely or not at all.

        Raises NotFound, and Corrupt if the size or the SHA-256 differs from `expected`.
        """

    def local_path(self, key: str) -> Path | None:
        """Return the local path of the object or folder, which may not exist; None for a remote store."""

    def delete(self, prefix: str) -> None:
        """Delete the object `prefix` and all objects below the folder `prefix`, manifests first."""


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
    """Return a readable `file://` URI: only `%` is escaped, which would be ambiguous otherwise."""
    return "file://" + path.as_posix().replace("%", "%25")


def parse_location(uri: str) -> S3Location | FolderLocation:
    """Parse `s3://bucket/prefix`, `file:///path` (percent-escapes allowed) or a plain path.

    `~` is the user's home folder. Raises InvalidLocation for any other scheme, and for an unknown user.
    """
    if uri.startswith("s3://"):
        return _parse_s3(uri)
    if uri.startswith("file://"):
        return _parse_file(uri)
    if "://" in uri:
        scheme = uri.split("://", 1)[0]
        raise InvalidLocation(
            f"{scheme}://…", "the scheme is not supported; use `s3://bucket/prefix`, `file:///path` or a path"
        )
    try:
        return FolderLocation(Path(uri).expanduser().absolute())
    except RuntimeError as error:
        raise InvalidLocation(uri, "its user has no home folder here; write the whole path") from error


def _parse_s3(uri: str) -> S3Location:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:  # not repeated in the message: it may be a secret
        raise InvalidLocation("s3://…", "credentials in the URI are not accepted; use the AWS SDK's own configuration")
    if not bucket:
        raise InvalidLocation(uri, "has no bucket; write `s3://bucket/prefix`")
    return S3Location(bucket, prefix.strip("/"))


def _parse_file(uri: str) -> FolderLocation:
    host, slash, path = uri.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not slash:
        raise InvalidLocation(uri, "is not a local path; write `file:///absolute/path`")
    return FolderLocation(Path(unquote("/" + path)))


def public_endpoint(endpoint: str) -> str:
    """Return scheme, host and port of an endpoint, which are safe to show in a message."""
    parts = urlsplit(endpoint)  # user information and query may contain credentials
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}:{parts.port}" if parts.port else f"{parts.scheme}://{host}"


# -- keys --------------------------------------------------------------------------------------------------------------


def checked_key(key: str) -> str:
    """Return `key`. Raises StoreError if it is empty or could escape from the root."""
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(repr(key), "is not a key; a key is a relative path without empty parts, `.` and `..`")
    return key


def checked_prefix(prefix: str) -> str:
    """Return `prefix` without a trailing slash; empty means the root. Raises StoreError for an invalid one."""
    prefix = prefix.rstrip("/")
    return checked_key(prefix) if prefix else ""


def is_below(key: str, prefix: str) -> bool:
    """Return whether `key` is `prefix` itself or below the folder `prefix`; everything is below an empty prefix."""
    return not prefix or key == prefix or key.startswith(prefix + "/")


def deletion_order(keys: list[str]) -> list[str]:
    """Sort manifests to the front, so that a partly deleted artifact never counts as complete."""
    return sorted(keys, key=lambda key: (key.rsplit("/", 1)[-1] != MANIFEST, key))


# -- bytes -------------------------------------------------------------------------------------------------------------


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_expected(key: str, size: int, sha256: str, expected: StoredObject | None) -> None:
    """Raise Corrupt, with `key`, unless size and checksum are the expected ones."""
    if expected is None or (size, sha256) == (expected.size, expected.sha256):
        return
    got = f"{size} bytes, sha256 {sha256[:16]}…"
    raise Corrupt(
        key,
        f"bytes differ from the manifest: got {got}, expected {expected.size} bytes, sha256 {expected.sha256[:16]}…; "
        "the object is damaged or was overwritten; re-create it with `stagecoach run --from` the stage that made it",
    )
