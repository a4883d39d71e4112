"""Files of a cache that carry their own SHA-256: what is read from a cache is what was written to it, or is made again.

A cache is no artifact: its files have no manifest, and they survive attempts on a disk that may change them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from stagecoach_api.stores.base import sha256_of_file

log = logging.getLogger(__name__)


class Damaged(Exception):
    """A file of a cache is missing, or its bytes are not those that were written."""


def write_sealed(path: Path, content: bytes) -> None:
    """Write a file atomically: the SHA-256 of the content (32 bytes), then the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name first: a process that is killed must not leave half a file.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(hashlib.sha256(content).digest() + content)
    unfinished.replace(path)


def read_sealed(path: Path) -> bytes | None:
    """Return the content of a file, or None if there is none or it is damaged, which is logged."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, content = stored[:32], stored[32:]
    if hashlib.sha256(content).digest() == digest:
        return content
    warn_of_damage(path, "its SHA-256 differs from what was written")
    return None


def require_sha256(path: Path, expected: str) -> None:
    """Raise Damaged unless the file has this SHA-256. It is read in pieces, at about 1.5 GB/s of a core."""
    try:
        found = sha256_of_file(path)
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    if found != expected:
        raise Damaged(f"{path}: its SHA-256 is {found[:16]}…, what was written had {expected[:16]}…")


def warn_of_damage(path: Path, why: object) -> None:
    log.warning("the cache in %s cannot be used (%s); it is made again", path, why)
