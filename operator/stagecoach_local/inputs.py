"""Inputs from outside the run: where relative URIs point, and what lies there."""

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
from stagecoach_core.plan import external_keys
from stagecoach_core.values import External
from stagecoach_local.workspace import write_json

SETTLED_SECONDS = 2.0
"""A file changed less than this before it was hashed may change again without a new time stamp: not remembered."""


@dataclass(frozen=True)
class Lookup:
    """What was found of a run's external inputs."""

    found: dict[str, External]
    """By `Reference.key`."""
    failures: dict[str, StoreError]
    """Why the others were not found, by `Reference.key`."""


class HashMemory:
    """Remembers the sha256 of files by path, size, time of change and inode, so that a rerun reads no data."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._known = _read_memory(path)
        self._changed = False

    def sha256(self, path: Path) -> str:
        """Return the hex sha256 of a file. Safe to call from several threads."""
        key = str(path.absolute())
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(key)
        if known is not None and known[:3] == mark:
            return str(known[3])
        sha256 = sha256_of_file(path)
        if self._clock() - stat.st_mtime > SETTLED_SECONDS:
            self._known[key] = [*mark, sha256]
            self._changed = True
        return sha256

    def save(self) -> None:
        """Write what was learnt. Files that are gone are forgotten."""
        if self._changed:
            write_json(self._path, {key: value for key, value in self._known.items() if Path(key).exists()})


def _read_memory(path: Path) -> dict[str, list[int | str]]:
    """Return what was remembered; nothing where the file is missing or damaged, for it is only a cache."""
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {key: value for key, value in entries if isinstance(value, list) and len(value) == 4}


def input_root(run: TrainingRun, folder: Path) -> str:
    """Return the URI that relative inputs are resolved against: `spec.storage.inputs`, else the run file's folder."""
    given = run.spec.storage.inputs
    return file_uri(folder) if given is None else absolute(given, file_uri(folder))


def look_up(
    run: TrainingRun,
    folder: Path,
    hash_file: Callable[[Path], str],
    wanted: Callable[[str], bool] = lambda uri: True,
) -> Lookup:
    """Find the external inputs of `run`, whose file lies in `folder`.

    `hash_file` returns the sha256 of a local file; `wanted` tells whether a URI, as the run writes it, is looked at.
    """
    root = input_root(run, folder)
    storage = run.spec.storage
    failures: dict[str, StoreError] = {}
    uris: dict[str, str] = {}
    for key, uri in external_keys(run).items():
        if not wanted(uri):
            continue
        try:
            uris[key] = absolute(uri, root)
        except StoreError as error:
            failures[key] = error
    results = find_inputs(uris, storage.endpoint, storage.region, hash_file)
    failures |= {key: result for key, result in results.items() if isinstance(result, StoreError)}
    return Lookup(
        found={
            key: External(uri=result.uri, digest=result.digest)
            for key, result in results.items()
            if isinstance(result, ResolvedInput)
        },
        failures=failures,
    )


def unknown_external(uri: str) -> External:
    """Return a stand-in for an input that could not be looked at: a plan can be drawn, but its digests mean nothing."""
    return External(uri=uri, digest=digest_of(["unknown", uri]))
