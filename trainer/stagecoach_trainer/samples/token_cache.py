"""Token shards: data sets tokenised once, cached on disk by a digest of their inputs, and read by memory map.

A shard is a folder `cache/tokens/<digest>`: `tokens.bin` (int32), `trained.bin` (bool, one per token; absent if every
token carries loss), `offsets.bin` (int64, the start of each sample, and the end), `index.json`, written last, with the
SHA-256 of each of them and of itself. Opening a shard verifies them all; a wrong one is built again, never trained on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from stagecoach_api.artifacts import digest_of
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.runtime.sealed import Damaged, require_sha256, warn_of_damage

VERSION = 2
"""Version of the shards; increase it when the code encodes the same input differently."""

SAMPLES_PER_REPORT = 128

TOKENS, TRAINED, OFFSETS, INDEX = "tokens.bin", "trained.bin", "offsets.bin", "index.json"

Tokens = npt.NDArray[np.int32]
Trained = npt.NDArray[np.bool_]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenShard:
    """Samples of a data set."""

    tokens: Tokens
    """The concatenated token ids of all samples."""

    trained: Trained | None
    """Whether token i carries loss. None if every token does."""

    offsets: Offsets
    """Start of each of the S samples in `tokens`, and the end [S + 1]."""

    counts: Mapping[str, int]
    """Counts of the encoding."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])


class TokenShardWriter:
    """Appends samples to a new shard."""

    def __init__(self, folder: Path, context: StageContext, activity: str) -> None:
        self._folder = folder
        self._context = context
        self._activity = activity
        self._files: dict[str, IO[bytes]] = {}
        self._hashes: dict[str, Any] = {}
        self._offsets = [0]

    def add(self, tokens: Tokens, trained: Trained | None = None) -> None:
        """Append a sample: its token ids [T] and whether each of them carries loss [T]."""
        self._write(TOKENS, np.ascontiguousarray(tokens, np.int32).tobytes())
        if trained is not None:
            self._write(TRAINED, np.ascontiguousarray(trained, np.bool_).tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens))
        if len(self._offsets) % SAMPLES_PER_REPORT == 0:
            self.report()

    def report(self) -> None:
        """Report progress. Raises Interrupted if the stage is asked to stop."""
        self._context.progress.report(self._activity, self._offsets[-1], unit="tokens")
        if self._context.stop.is_set():
            raise Interrupted(f"asked to stop during: {self._activity}; the unfinished shard is discarded")

    def close(self, counts: Mapping[str, int]) -> None:
        """Finish the shard; `counts` are those of the encoding."""
        masked = TRAINED in self._files
        self._write(TOKENS, b"")  # creates the file also for a shard without samples
        self._write(OFFSETS, np.asarray(self._offsets, np.int64).tobytes())
        for file in self._files.values():
            file.close()
        sums = {name: found.hexdigest() for name, found in sorted(self._hashes.items())}
        index = {"version": VERSION, "counts": dict(sorted(counts.items())), "masked": masked, "sha256": sums}
        (self._folder / INDEX).write_text(json.dumps(index | {"digest": digest_of(index)}), encoding="utf-8")

    def _write(self, name: str, data: bytes) -> None:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("wb")
            self._hashes[name] = hashlib.sha256()
        self._files[name].write(data)
        self._hashes[name].update(data)


def token_shard(
    context: StageContext, key: Mapping[str, Any], activity: str, build: Callable[[TokenShardWriter], Mapping[str, int]]
) -> TokenShard:
    """Return the shard of `key` from the cache, or build it: `build` adds the samples and returns the counts.

    `key` contains everything that the samples depend on. One process of the machine builds the shard while the others
    wait. A shard is complete or does not exist, whenever a process is killed.
    """
    digest = digest_of({"version": VERSION, **key})
    folder = context.cache / "tokens" / digest
    with _locked(folder.with_suffix(".lock")):
        if not (folder / INDEX).is_file():
            _make(context, folder, activity, build)
    try:
        return read_shard(folder)  # outside the lock, so that the processes of a machine verify it side by side
    except Damaged as error:
        return _made_again(context, folder, error, activity, build)


def _made_again(
    context: StageContext,
    folder: Path,
    error: Damaged,
    activity: str,
    build: Callable[[TokenShardWriter], Mapping[str, int]],
) -> TokenShard:
    with _locked(folder.with_suffix(".lock")):
        try:
            return read_shard(folder)  # another process may have built it again
        except Damaged:
            warn_of_damage(folder, error)
            _make(context, folder, activity, build)
    try:
        return read_shard(folder)
    except Damaged as again:
        raise UserError(
            f"{again}; it was built again and is damaged again: replace the disk of the cache {context.cache}"
        ) from again


def _make(
    context: StageContext, folder: Path, activity: str, build: Callable[[TokenShardWriter], Mapping[str, int]]
) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        writer = TokenShardWriter(unfinished, context, activity)
        writer.close(build(writer))
        # Renaming a folder is atomic, so no reader sees half a shard.
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_shard(folder: Path) -> TokenShard:
    """Verify and open a finished shard. Raises Damaged unless every byte is as it was written."""
    index = _read_index(folder / INDEX)
    for name, expected in index["sha256"].items():
        require_sha256(folder / name, expected)
    offsets = np.fromfile(folder / OFFSETS, np.int64)
    tokens = _map(folder / TOKENS, np.int32)
    trained = _map(folder / TRAINED, np.bool_) if index["masked"] else None
    return TokenShard(tokens, trained, offsets, index["counts"])


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        expected = index.pop("digest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} cannot be read ({error!r})") from error
    if digest_of(index) != expected:
        raise Damaged(f"{path}: its content differs from what was written")
    return index


def _map(path: Path, dtype: Any) -> Any:
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The kernel releases the lock when the process dies, so a killed process never blocks the others.
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
