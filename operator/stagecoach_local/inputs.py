"""Inputs from outside the run: how relative URIs are resolved, and the digests of the inputs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.artifacts import ResolvedInput, digest_of
from stagecoach_api.spec import TrainingRun
from stagecoach_api.store import StoreError
from stagecoach_api.stores.base import file_uri, sha256_of_file
from stagecoach_api.stores.lookup import absolute, find_inputs
from stagecoach_core.plan import external_uris
from stagecoach_core.values import External
from stagecoach_local.workspace import write_json

SETTLED_SECONDS = 2.0
"""A file that changed less than this before it was hashed is not cached: it may change again within the same tick of
the file system's clock, which would leave its time stamp as it is."""


@dataclass(frozen=True)
class InputLookup:
    """The external inputs of a run that were found, and the errors of the others."""

    found: dict[str, External]
    """By `Reference.key`."""
    failures: dict[str, StoreError]
    """By `Reference.key`."""


class HashCache:
    """Caches the SHA-256 of files by path, size, modification time and inode, so that a rerun reads no data."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._entries = _read_cache(path)
        self._changed = False

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file in hexadecimal. Safe to call from several threads."""
        key = str(path.absolute())
        stat = path.stat()  # before the file is read: if it changes meanwhile, the entry does not match the next time
        version = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        cached = self._entries.get(key)
        if cached is not None and cached[:3] == version:
            return str(cached[3])
        sha256 = sha256_of_file(path)
        if self._clock() - stat.st_mtime > SETTLED_SECONDS:
            self._entries[key] = [*version, sha256]
            self._changed = True
        return sha256

    def save(self) -> None:
        """Write the cache if it has changed, without files that no longer exist."""
        if self._changed:
            write_json(self._path, {key: value for key, value in self._entries.items() if Path(key).exists()})


def _read_cache(path: Path) -> dict[str, list[int | str]]:
    """Return the cached entries; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in entries if isinstance(value, list) and len(value) == 4}


def input_root(run: TrainingRun, folder: Path) -> str:
    """Return the URI that relative inputs are resolved against: `spec.storage.inputs`, else the run file's folder."""
    inputs = run.spec.storage.inputs
    return file_uri(folder) if inputs is None else absolute(inputs, file_uri(folder))


def find_external_inputs(
    run: TrainingRun,
    folder: Path,
    hash_file: Callable[[Path], str],
    wanted: Callable[[str], bool] = lambda uri: True,
) -> InputLookup:
    """Find the external inputs of `run`, whose file is in `folder`.

    `hash_file`: returns the SHA-256 of a local file. `wanted`: returns whether to look up a URI, given as written in
    the run.
    """
    root = input_root(run, folder)
    storage = run.spec.storage
    failures: dict[str, StoreError] = {}
    uris: dict[str, str] = {}
    for key, uri in external_uris(run).items():
        try:
            if wanted(uri):
                uris[key] = absolute(uri, root)
        except StoreError as error:
            failures[key] = error
    results = find_inputs(uris, storage.endpoint, storage.region, hash_file)
    failures |= {key: result for key, result in results.items() if isinstance(result, StoreError)}
    return InputLookup(
        found={
            key: External(uri=result.uri, digest=result.digest)
            for key, result in results.items()
            if isinstance(result, ResolvedInput)
        },
        failures=failures,
    )


def unknown_external(uri: str) -> External:
    """Return a placeholder for an unreachable input: planning works, but digests that depend on it are arbitrary."""
    return External(uri=uri, digest=digest_of(["unknown", uri]))
