"""Inputs from outside the run: where relative URIs point, and what lies there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.artifacts import digest_of
from stagecoach_api.spec import TrainingRun
from stagecoach_api.store import StoreError, external_digest, list_external
from stagecoach_api.stores.base import FolderLocation, file_uri, parse_location, sha256_of_file
from stagecoach_cli.workspace import write_json
from stagecoach_core.plan import external_keys
from stagecoach_core.values import External

SETTLED_SECONDS = 2.0
"""A file changed less than this before it was hashed may change again without a new time stamp: not remembered."""

LOOKUP_THREADS = 8


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


def absolute(uri: str, root: str) -> str:
    """Return `uri` as it is where it is absolute, else below `root`, an absolute URI."""
    if "://" in uri or uri.startswith(("/", "~")):
        return parse_location(uri).uri
    location = parse_location(root)
    if isinstance(location, FolderLocation):
        return file_uri(Path(os.path.normpath(location.path / uri)))
    return f"{location.uri.rstrip('/')}/{os.path.normpath(uri)}"


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

    def find(uri: str) -> External | StoreError:
        try:
            where = absolute(uri, root)
            _, entries = list_external(where, storage.endpoint, storage.region, hash_file)
        except StoreError as error:
            return error
        return External(uri=where, digest=external_digest(entries))

    keys = {key: uri for key, uri in external_keys(run).items() if wanted(uri)}
    with ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="inputs") as pool:
        results = dict(zip(keys, pool.map(find, keys.values()), strict=True))
    return Lookup(
        found={key: result for key, result in results.items() if isinstance(result, External)},
        failures={key: result for key, result in results.items() if isinstance(result, StoreError)},
    )


def unknown_external(uri: str) -> External:
    """Return a stand-in for an input that could not be looked at: a plan can be drawn, but its digests mean nothing."""
    return External(uri=uri, digest=digest_of(["unknown", uri]))
