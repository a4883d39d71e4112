"""Claims: of several drivers that share a storage, one at a time works on a stage digest.

Drivers in two folders, or on two machines, that run the same file with the same storage would otherwise both train each
stage. A claim is about a stage digest: the other driver waits, and then takes the artifact from the cache.

In a folder, a claim is a lock of the operating system (`FileClaims`). The attempt's process inherits it, so it is free
when both are gone, however they ended, and not before. On S3, a claim is a lease (`LeaseClaims`): an object that its
holder rewrites again and again. No clock is read but the observer's own: a lease has expired if it was observed
unchanged for `LEASE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Protocol

import psutil

from stagecoach_api.store import AccessDenied, NotFound, Store, StoreError, Unreachable
from stagecoach_local.processes import is_running

FOLDER = "claims"
LEASE_SECONDS = 15.0
RENEWAL_SECONDS = 4.0
LOOK_SECONDS = 1.0
"""Pause between two looks at a lease that another driver holds."""

MAX_REFUSED = 5

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""The file system has no locks, as some network file systems."""


@dataclass(frozen=True)
class Holder:
    """The process of a driver."""

    host: str
    pid: int
    created: float
    driver: str = ""
    """Distinguishes drivers in one process."""

    @classmethod
    def of_this_process(cls) -> Holder:
        return cls(_host(), os.getpid(), psutil.Process().create_time(), secrets.token_hex(8))

    @classmethod
    def parse(cls, text: bytes | str) -> Holder | None:
        """Return the holder that a claim names; None if it cannot be read, as while it is written."""
        try:
            content = json.loads(text)
            return cls(str(content["host"]), int(content["pid"]), float(content["created"]), str(content["driver"]))
        except (ValueError, KeyError, TypeError):
            return None

    def is_known_to_be_dead(self) -> bool:
        """Whether the process ran here and has ended; processes of other machines cannot be looked at."""
        return self.host == _host() and not is_running(self.pid, self.created)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split(' ')[0]}"


def _host() -> str:
    """Return what identifies this machine since its start, and the set of process ids this process sees."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return " ".join(parts)


class Claim(Protocol):
    """A claim that this driver holds."""

    @property
    def is_lost(self) -> bool:
        """Whether another driver has it now."""

    @property
    def inherited(self) -> tuple[int, ...]:
        """File descriptors that the attempt's process inherits."""

    def release(self) -> None:
        """Give it up. Raises nothing: an unreachable store ends a lease too."""


class Backend(Protocol):
    """How claims are kept."""

    def take(self, digest: str) -> Claim | Holder | None:
        """Return the claim, or its holder (None if unknown). Raises StoreError and OSError."""


# -- in a folder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileClaim:
    """A locked file, deleted when it is released."""

    file: IO[str]
    path: Path
    is_lost: bool = False

    @property
    def inherited(self) -> tuple[int, ...]:
        return (self.file.fileno(),)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()  # before the lock ends: `take` notices that it has locked a deleted file
        self.file.close()


@dataclass(frozen=True)
class FileClaims:
    """Claims as files that are locked."""

    folder: Path
    holder: Holder

    def take(self, digest: str) -> Claim | Holder | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / digest
        while True:
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_still(file, path):
                    file.close()
                    continue
                file.truncate(0)
                file.write(json.dumps(asdict(self.holder)))
                file.flush()
                return FileClaim(file, path)
            except BlockingIOError:
                file.seek(0)
                found = Holder.parse(file.read())
                file.close()
                return found
            except OSError:
                file.close()
                raise


def _is_still(file: IO[str], path: Path) -> bool:
    """Whether `path` is still the open file, which its last holder may have deleted before it was locked."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


# -- on S3 -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """A lease as it was observed."""

    key: str
    content: bytes
    since: float
    """When it was first observed like this, by this process's own clock."""


class LeaseClaim:
    """A lease, renewed by a thread until it is released or lost."""

    def __init__(self, store: Store, key: str, holder: Holder, renewal_seconds: float) -> None:
        self._store = store
        self._key = key
        self._holder = holder
        self._seconds = renewal_seconds
        self._count = 0
        self._ended = threading.Event()
        self.is_lost = False
        self.inherited: tuple[int, ...] = ()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds):
            # An outage is waited for: no other driver can take the lease meanwhile.
            with contextlib.suppress(StoreError, OSError):
                if not holds_lease(self._store, self._key, lease_content(self._holder, self._count)):
                    self.is_lost = True
                    return
                self._store.write(self._key, lease_content(self._holder, self._count + 1))
                self._count += 1

    def release(self) -> None:
        self._ended.set()
        self._thread.join()  # a renewal under way would write the lease again
        if not self.is_lost:
            with contextlib.suppress(StoreError, OSError):
                self._store.delete(self._key)


@dataclass
class LeaseClaims:
    """Claims as objects that are renewed.

    The objects of a digest are numbered, and the highest number holds the claim. An expired lease is taken over by
    creating the next number, which only one of several drivers can do, as the store creates an object once.
    """

    store: Store
    holder: Holder
    lease_seconds: float = LEASE_SECONDS
    renewal_seconds: float = RENEWAL_SECONDS
    look_seconds: float = LOOK_SECONDS
    clock: Callable[[], float] = time.monotonic

    _refused: int = 0
    """Looks in succession at which the store refused a request."""
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _looked: dict[str, tuple[float, Holder | None]] = field(default_factory=dict)

    def take(self, digest: str) -> Claim | Holder | None:
        looked, holder = self._looked.get(digest, (float("-inf"), None))
        if self.clock() - looked < self.look_seconds:
            return holder
        try:
            found = self._take(f"{FOLDER}/{digest}", digest)
            self._refused = 0
        except (AccessDenied, Unreachable):
            raise
        except StoreError:
            # Some servers refuse a request on an object that another one creates or deletes at the same time.
            self._refused += 1
            if self._refused >= MAX_REFUSED:
                raise
            found = None
        self._looked[digest] = self.clock(), found if isinstance(found, Holder) else None
        return found

    def _take(self, folder: str, digest: str) -> Claim | Holder | None:
        keys = lease_keys(self.store, folder)
        if not keys:
            return self._create(folder, 1, keys)
        try:
            content = self.store.read(keys[-1])
        except NotFound:
            return None  # released since it was listed: the next look shows by whom it was taken, if by anyone
        if content == lease_content(self.holder, 0):
            return self._held(keys.pop(), keys)  # created by a request of this driver that was answered with an error
        holder = self._living_holder(digest, keys[-1], content)
        return holder if holder is not None else self._create(folder, int(keys[-1].rpartition("/")[2]) + 1, keys)

    def _create(self, folder: str, number: int, others: list[str]) -> Claim | None:
        key, content = f"{folder}/{number:08d}", lease_content(self.holder, 0)
        # False: another driver was faster, and the next look shows which. Looked at again, since others may have taken
        # it meanwhile, or the store creates an object twice.
        if self.store.commit(key, content) and holds_lease(self.store, key, content):
            return self._held(key, others)
        return None

    def _held(self, key: str, others: list[str]) -> Claim:
        for other in others:
            self.store.delete(other)
        return LeaseClaim(self.store, key, self.holder, self.renewal_seconds)

    def _living_holder(self, digest: str, key: str, content: bytes) -> Holder | None:
        """Return the holder of a lease; None if it has expired, or its process is known to be dead."""
        seen = self._seen.get(digest)
        if seen is None or (seen.key, seen.content) != (key, content):
            seen = self._seen[digest] = _Seen(key, content, self.clock())
        holder = Holder.parse(content)
        if holder is None or holder.is_known_to_be_dead() or self.clock() - seen.since >= self.lease_seconds:
            return None
        return holder


def lease_content(holder: Holder, count: int) -> bytes:
    """Return the content of a lease; it differs after every renewal."""
    return json.dumps({**asdict(holder), "count": count}).encode()


def holds_lease(store: Store, key: str, content: bytes) -> bool:
    """Whether the object with this content holds the claim: no other has a higher number or has replaced it."""
    if lease_keys(store, key.rpartition("/")[0])[-1:] != [key]:
        return False
    try:
        return store.read(key) == content
    except NotFound:
        return False


def lease_keys(store: Store, folder: str) -> list[str]:
    """Return the keys of the leases of a digest; the last one holds the claim."""
    return sorted(entry.key for entry in store.list(folder) if entry.key.rpartition("/")[2].isdigit())


# -- a driver's claims -------------------------------------------------------------------------------------------------


class Claims:
    """The claims of one driver, by stage digest."""

    def __init__(self, store: Store, backend: Backend | None = None) -> None:
        self._store = store
        self._backend = backend if backend is not None else _backend(store)
        self._held: dict[str, Claim] = {}

    def take(self, digest: str) -> str | None:
        """Claim a digest; return None if it is held now, else who holds it. Raises StoreError and OSError."""
        if digest in self._held and not self._held[digest].is_lost:
            return None
        self.release(digest)
        try:
            found = self._backend.take(digest)
        except OSError as error:
            if error.errno not in _NO_LOCKS or isinstance(self._backend, LeaseClaims):
                raise
            self._backend = LeaseClaims(self._store, Holder.of_this_process())
            found = self._backend.take(digest)
        if found is None or isinstance(found, Holder):
            return "another driver" if found is None else str(found)
        self._held[digest] = found
        return None

    def holds(self, digest: str) -> bool:
        return digest in self._held

    def is_lost(self, digest: str) -> bool:
        """Whether another driver has taken a claim over that this driver holds."""
        return digest in self._held and self._held[digest].is_lost

    def inherited(self, digest: str) -> tuple[int, ...]:
        """Return the file descriptors that an attempt at the digest inherits."""
        return self._held[digest].inherited if digest in self._held else ()

    def release(self, digest: str) -> None:
        claim = self._held.pop(digest, None)
        if claim is not None:
            claim.release()

    def release_all(self) -> None:
        for digest in list(self._held):
            self.release(digest)


def _backend(store: Store) -> Backend:
    folder = store.local_path(FOLDER)
    holder = Holder.of_this_process()
    return LeaseClaims(store, holder) if folder is None else FileClaims(folder, holder)
