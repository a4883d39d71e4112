"""A store in an S3 bucket, of AWS or of any compatible server. boto3 is imported at the first call.

Integrity: every upload has a Content-MD5 that the server checks, and its SHA-256 as metadata, which `read` compares.
botocore's own default checksums are off (`when_required`), because many compatible servers reject them (boto3#4392);
what the trainer downloads is compared with the SHA-256 in a manifest anyway.

Commits use conditional writes (`If-None-Match: *`, `If-Match`), which AWS has offered since 2024. The first one of
each kind is followed by one that has to fail. A server that ignores or refuses the condition is asked before each plain
write instead, which excludes no other writer (`is_exclusive`).
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stagecoach_api.artifacts import MANIFEST, StoredObject
from stagecoach_api.stores.base import (
    Corrupt,
    NotFound,
    S3Location,
    Stamped,
    StoreEntry,
    StoreError,
    check_expected,
    checked_key,
    checked_prefix,
    deletion_order,
    is_below,
    sha256_of_file,
)
from stagecoach_api.stores.folder import publish, temporary_file, translated
from stagecoach_api.stores.retry import TRANSFERS, Retrier, StorePatience
from stagecoach_api.stores.s3_errors import error_code, error_status, is_absent, is_transient, store_error
from stagecoach_api.stores.s3_session import new_session

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

S = TypeVar("S")
T = TypeVar("T")

PART_BYTES = 8 << 20
"""Files larger than this are transferred in parts of at least this size (S3 requires ≥ 5 MiB)."""
MAX_PARTS = 10_000
"""S3's limit for one upload; larger files get larger parts."""
CONCURRENCY = 8
"""Number of a file's parts in flight, which also bounds the memory of a transfer."""
OUT_OF_RANGE = 416
MAX_CORRUPT_DOWNLOADS = 2
"""A download with wrong bytes is repeated once: the network may have been at fault."""
MARK = "stagecoach-commit"
"""Key of the metadata with a random value for each conditional write, by which a retry recognises what an earlier try
of the same write made, although its answer was lost."""
NO_TAG = "0" * 32
"""A version that no object has."""
SHA256 = "stagecoach-sha256"
"""Key of the metadata with the SHA-256 (hex) of an object's bytes."""


@dataclass(frozen=True)
class _Head:
    """The result of a HEAD request."""

    size: int
    etag: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class _Written:
    """The result of a conditional write."""

    tag: str | None
    """Version of what was written. None if the condition did not hold."""
    supported: bool = True
    """False if the server refuses conditions."""


class S3Store:
    """Objects below `location`. See `stagecoach_api.store.Store` for the methods."""

    def __init__(
        self,
        location: S3Location,
        endpoint: str | None = None,
        region: str | None = None,
        retrier: Retrier | None = None,
        part_bytes: int = PART_BYTES,
        patience: StorePatience = TRANSFERS,
    ) -> None:
        self.uri = location.uri
        self._location = location
        self.endpoint = endpoint
        self.region = region
        self._patience = patience
        self._retrier = Retrier(patience.retries) if retrier is None else retrier
        self._part_bytes = part_bytes
        self._has_answered = False
        self._creates_once: bool | None = None
        """Whether the server is known to honour `If-None-Match`. None before the first commit."""
        self._replaces_one: bool | None = None
        """The same for `If-Match`."""

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    # -- small objects -------------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Iterator[StoreEntry]:
        prefix = checked_prefix(prefix)
        found = [entry for entry in self.list_raw(prefix) if is_below(entry.key, prefix)]
        yield from sorted(found, key=lambda entry: entry.key)

    def list_raw(self, start: str) -> Iterator[StoreEntry]:
        """Yield every object whose key starts with the characters `start`, page by page, in the server's order."""
        root = f"{self._location.prefix}/" if self._location.prefix else ""
        token: str | None = None
        while True:
            page = self._list_page(root + start, token)
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(root)
                if key and not key.endswith("/"):  # consoles create empty objects to show folders
                    tag = "etag:" + item["ETag"].strip('"')
                    yield StoreEntry(key, item["Size"], tag, item["LastModified"].timestamp())
            following = page.get("NextContinuationToken")
            # A server that repeats its token would make this loop endless.
            if not page.get("IsTruncated") or following in (None, token):
                return
            token = following

    def exists(self, key: str) -> bool:
        return self._head(checked_key(key)) is not None

    def read(self, key: str) -> bytes:
        return _again_if_corrupt(lambda: self._read_once(checked_key(key)))

    def _read_once(self, key: str) -> bytes:
        def get(_: int) -> bytes:
            answer = self._client.get_object(**self._at(key))
            limit, size = self._patience.read_bytes, answer["ContentLength"]
            if limit is not None and size > limit:
                answer["Body"].close()
                raise Corrupt(key, f"has {size:,} bytes, which is more than such an object can have ({limit:,})")
            body = answer["Body"].read()
            stated = answer.get("Metadata", {}).get(SHA256, "")
            if stated and stated != hashlib.sha256(body).hexdigest():
                raise Corrupt(key, f"the bytes differ from what was written to {self.uri}; the object is damaged")
            return body

        return self._call(key, get)

    def read_start(self, key: str, num_bytes: int) -> bytes:
        where = self._at(checked_key(key)) | {"Range": f"bytes=0-{num_bytes - 1}"}

        def get(_: int) -> bytes:
            try:
                body: bytes = self._client.get_object(**where)["Body"].read(num_bytes)  # a server may ignore the range
            except Exception as error:
                if error_status(error) == OUT_OF_RANGE:
                    return b""  # of an empty object
                raise
            return body

        return self._call(key, get)

    def write(self, key: str, data: bytes) -> None:
        checked_key(key)
        self._call(key, lambda _: self._put(key, data, _metadata(hashlib.sha256(data).hexdigest())))

    def commit(self, key: str, data: bytes) -> bool:
        if self._creates_once is not True and self._head(checked_key(key)) is not None:
            return False
        if self._creates_once is None:
            return self._first_commit(key, data)
        if self._creates_once:
            return self._conditional_put(key, data, _marked(data), IfNoneMatch="*").tag is not None
        # Two commits between HEAD and PUT both succeed, and the later one counts. The objects that its manifest names
        # are its own in either case.
        self._call(key, lambda _: self._put(key, data, _marked(data)))
        return True

    def _first_commit(self, key: str, data: bytes) -> bool:
        """Create an object that does not exist, and find out whether the server excludes others meanwhile."""
        metadata = _marked(data)
        first = self._conditional_put(key, data, metadata, IfNoneMatch="*")
        if not first.supported:
            self._creates_once = False
            return self.commit(key, data)
        if first.tag is None:
            return False
        # With the same mark, so that a server which ignores the condition changes nothing.
        again = self._conditional_put(key, data, metadata, IfNoneMatch="*", recognise=False)
        self._creates_once = again.supported and again.tag is None
        return True

    @property
    def is_exclusive(self) -> bool:
        return self._creates_once is not False and self._replaces_one is not False

    def read_stamped(self, key: str) -> Stamped:
        def get(_: int) -> Stamped:
            answer = self._client.get_object(**self._at(checked_key(key)))
            modified = answer["LastModified"].timestamp()
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = time.time() if date is None else parsedate_to_datetime(date).timestamp()
            return Stamped(answer["Body"].read(), answer["ETag"].strip('"'), modified, now)

        return self._call(key, get)

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        if self._replaces_one is not True:
            head = self._head(checked_key(key))
            if head is None or head.etag != tag:
                return None
        if self._replaces_one is None:
            wrong = self._conditional_put(key, data, _marked(data), IfMatch=f'"{NO_TAG}"')
            self._replaces_one = wrong.supported and wrong.tag is None
            if wrong.tag is not None:
                return wrong.tag
        if self._replaces_one:
            return self._conditional_put(key, data, _marked(data), IfMatch=f'"{tag}"').tag
        return self._call(key, lambda _: self._put(key, data, _marked(data)))

    def local_path(self, key: str) -> Path | None:
        return None

    def delete(self, prefix: str) -> None:
        prefix = checked_key(prefix.rstrip("/"))
        keys = deletion_order([entry.key for entry in self.list(prefix)])
        manifests = [key for key in keys if key.rsplit("/", 1)[-1] == MANIFEST]
        # One request per key: DeleteObjects requires a checksum, and compatible servers disagree on which.
        _map_concurrently(self._delete, manifests)
        _map_concurrently(self._delete, keys[len(manifests) :])

    def _delete(self, key: str) -> None:
        self._call(key, lambda _: self._client.delete_object(**self._at(key)))

    # -- files ---------------------------------------------------------------------------------------------------------

    def upload(self, path: Path, key: str) -> StoredObject:
        checked_key(key)
        with translated(key, path):
            stored = StoredObject(path=key, size=path.stat().st_size, sha256=sha256_of_file(path))
            if stored.size <= self._part_bytes:
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() != stored.sha256:
                    raise StoreError(key, f"{path} changed while it was stored")
                self._call(key, lambda _: self._put(key, data, _metadata(stored.sha256)))
            else:
                self._upload_parts(path, stored)
        return stored

    def download(self, key: str, path: Path, expected: StoredObject | None = None) -> None:
        _again_if_corrupt(lambda: self._download_once(checked_key(key), path, expected))

    def _download_once(self, key: str, path: Path, expected: StoredObject | None) -> None:
        head = self._head(key)
        if head is None:
            raise NotFound(key, f"there is no such object in {self.uri}")
        with translated(key, path), temporary_file(path) as (temporary, file):
            file.truncate(head.size)  # parts are written at their offsets, in any order
            spans = _spans(head.size, self._part_bytes)
            _map_concurrently(lambda span: self._download_part(key, file.fileno(), head, span), spans)
            if expected is not None:
                check_expected(key, head.size, sha256_of_file(temporary), expected)
            publish(temporary, file, path)

    def _download_part(self, key: str, handle: int, head: _Head, span: tuple[int, int]) -> None:
        """Fetch the bytes [start, end) of the object that HEAD returned, and write them at their offset in the file."""
        start, end = span

        def get(_: int) -> bytes:
            # `If-Match` gives 412 if the object was replaced since HEAD: parts of two objects are never mixed.
            body = self._client.get_object(**self._at(key), Range=f"bytes={start}-{end - 1}", IfMatch=f'"{head.etag}"')[
                "Body"
            ].read()
            if len(body) != end - start:
                raise _Truncated(key, f"got {len(body)} of {end - start} bytes")
            return body

        os.pwrite(handle, self._call(key, get), start)

    # -- multipart -----------------------------------------------------------------------------------------------------

    def _upload_parts(self, path: Path, stored: StoredObject) -> None:
        key = stored.path
        part_bytes = max(self._part_bytes, -(-stored.size // MAX_PARTS))
        upload_id = self._call(
            key,
            lambda _: self._client.create_multipart_upload(**self._at(key), Metadata=_metadata(stored.sha256)),
        )["UploadId"]
        try:
            spans = list(enumerate(_spans(stored.size, part_bytes), start=1))
            parts = _map_concurrently(lambda part: self._upload_part(path, key, upload_id, *part), spans)
            self._call(key, lambda attempt: self._complete(stored, upload_id, parts, attempt))
        except BaseException:
            # Uploaded parts are kept, and billed, until the upload is completed or aborted.
            with suppress(Exception):
                self._client.abort_multipart_upload(**self._at(key), UploadId=upload_id)
            raise

    def _upload_part(
        self, path: Path, key: str, upload_id: str, number: int, span: tuple[int, int]
    ) -> CompletedPartTypeDef:
        start, end = span
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        if len(data) != end - start:
            raise StoreError(key, f"{path} changed while it was stored")
        answer = self._call(
            key,
            lambda _: self._client.upload_part(
                **self._at(key), UploadId=upload_id, PartNumber=number, Body=data, ContentMD5=_md5(data)
            ),
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _complete(
        self, stored: StoredObject, upload_id: str, parts: Sequence[CompletedPartTypeDef], attempt: int
    ) -> None:
        try:
            self._client.complete_multipart_upload(
                **self._at(stored.path), UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except Exception as error:
            # The response of an earlier attempt may have been lost after the server completed the upload: the upload
            # no longer exists (404 NoSuchUpload), and the object does.
            if attempt == 1 or not is_absent(error):
                raise
            head = self._head(stored.path)
            if head is None or head.metadata.get(SHA256) != stored.sha256:
                raise

    # -- requests ------------------------------------------------------------------------------------------------------

    @cached_property
    def _client(self) -> S3Client:
        """boto3's client, which threads can share. Its own retries are off: ours are bounded in time as well."""
        from botocore.config import Config

        config = Config(
            signature_version="s3v4",
            connect_timeout=self._patience.connect_seconds,
            read_timeout=self._patience.read_seconds,
            max_pool_connections=2 * CONCURRENCY,
            tcp_keepalive=True,
            retries={"total_max_attempts": 1, "mode": "standard"},
            s3={"addressing_style": "path" if self.endpoint else "auto"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return new_session().client("s3", endpoint_url=self.endpoint, region_name=self.region, config=config)

    def _call(self, key: str, operation: Callable[[int], T]) -> T:
        """Make a request, with retries; raises StoreError with the key."""
        limit = None if self._has_answered else self._retrier.policy.first_contact_attempts
        try:
            result = self._retrier.call(operation, is_transient, limit)
        except StoreError:
            raise
        except OSError as error:
            if type(error).__module__ == "builtins" and error.filename is not None:
                raise  # about a local file, not the network
            raise store_error(error, key, self.uri, self.endpoint) from None
        except Exception as error:
            raise store_error(error, key, self.uri, self.endpoint) from None
        self._has_answered = True
        return result

    def _at(self, key: str) -> dict[str, Any]:
        prefix = self._location.prefix
        return {"Bucket": self._location.bucket, "Key": f"{prefix}/{key}" if prefix else key}

    def _list_page(self, start: str, token: str | None) -> Any:
        arguments: dict[str, Any] = {"Bucket": self._location.bucket, "Prefix": start}
        if token is not None:
            arguments["ContinuationToken"] = token
        return self._call(start or self.uri, lambda _: self._client.list_objects_v2(**arguments))

    def _head(self, key: str) -> _Head | None:
        def head(_: int) -> _Head | None:
            try:
                answer = self._client.head_object(**self._at(key))
            except Exception as error:
                if is_absent(error):
                    return None
                raise
            return _Head(answer["ContentLength"], answer["ETag"].strip('"'), answer.get("Metadata", {}))

        return self._call(key, head)

    def _put(self, key: str, data: bytes, metadata: dict[str, str], **conditions: Any) -> str:
        """Write an object; return its version."""
        place = self._at(key)
        answer = self._client.put_object(**place, Body=data, ContentMD5=_md5(data), Metadata=metadata, **conditions)
        return answer["ETag"].strip('"')

    def _conditional_put(
        self, key: str, data: bytes, metadata: dict[str, str], recognise: bool = True, **conditions: Any
    ) -> _Written:
        """Put with `If-None-Match: *` or `If-Match`. `recognise`: whether a write whose answer was lost counts.

        A conflict with another conditional write (409 ConditionalRequestConflict) is transient: the retry gets 412 once
        the other write is done.
        """

        def put(attempt: int) -> _Written:
            try:
                return _Written(self._put(key, data, metadata, **conditions))
            except Exception as error:
                if error_status(error) in (404, 412):  # the condition does not hold, or no longer
                    return _Written(self._tag_of_lost(key, metadata) if recognise and attempt > 1 else None)
                if error_status(error) == 501 or error_code(error) == "NotImplemented":
                    return _Written(None, supported=False)
                raise

        return self._call(key, put)

    def _tag_of_lost(self, key: str, metadata: dict[str, str]) -> str | None:
        """Return the version that an earlier try of this write made, if only its answer was lost."""
        head = self._head(key)
        return head.etag if head is not None and head.metadata.get(MARK) == metadata[MARK] else None


class _Truncated(StoreError):
    """The body ended early. Transient."""


# -- helpers -----------------------------------------------------------------------------------------------------------


def _metadata(sha256: str) -> dict[str, str]:
    return {SHA256: sha256}


def _marked(data: bytes) -> dict[str, str]:
    return _metadata(hashlib.sha256(data).hexdigest()) | {MARK: secrets.token_hex(16)}


def _again_if_corrupt(read: Callable[[], T]) -> T:
    """Return `read()`; repeated if the bytes are wrong, because the network may have been at fault."""
    for _ in range(MAX_CORRUPT_DOWNLOADS - 1):
        with suppress(Corrupt):
            return read()
    return read()


def _md5(data: bytes) -> str:
    """Return Content-MD5, the only checksum of a transfer that every S3 server checks. It protects no secret."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _spans(size: int, part_bytes: int) -> list[tuple[int, int]]:
    """Split [0, size) into consecutive ranges [start, end)."""
    return [(start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]


def _map_concurrently(function: Callable[[S], T], items: Sequence[S]) -> Sequence[T]:
    """Apply `function` to the items, `CONCURRENCY` at a time. After the first error no further call starts."""
    if len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="s3") as pool:
        futures: Sequence[Future[T]] = [pool.submit(function, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for future in done:
            future.result()
        return [future.result() for future in futures]
