"""Token shards: data sets tokenised once, cached on disk by a digest of their inputs, and read by memory map.

A shard is a folder `cache/tokens/<digest>`: `tokens.bin` (int32), `trained.bin` (bool, one per token; absent if every
token carries loss), `offsets.bin` (int64, the start of each sample, and the end), `index.json`, written last.
"""

from __future__ import annotations

import fcntl
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

VERSION = 1
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
        self._offsets = [0]

    def add(self, tokens: Tokens, trained: Trained | None = None) -> None:
        """Append a sample: its token ids [T] and whether each of them carries loss [T]."""
        self._file(TOKENS).write(np.ascontiguousarray(tokens, np.int32).tobytes())
        if trained is not None:
            self._file(TRAINED).write(np.ascontiguousarray(trained, np.bool_).tobytes())
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
        self._file(TOKENS)  # creates the file also for a shard without samples
        for file in self._files.values():
            file.close()
        np.asarray(self._offsets, np.int64).tofile(self._folder / OFFSETS)
        index = {"version": VERSION, "counts": dict(sorted(counts.items())), "masked": TRAINED in self._files}
        (self._folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def _file(self, name: str) -> IO[bytes]:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("wb")
        return self._files[name]


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
    return read_shard(folder)


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
    """Open a finished shard. Raises UserError if the sizes of its files are inconsistent."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    offsets = np.fromfile(folder / OFFSETS, np.int64)
    tokens = _map(folder / TOKENS, np.int32, int(offsets[-1]))
    trained = _map(folder / TRAINED, np.bool_, int(offsets[-1])) if index["masked"] else None
    return TokenShard(tokens, trained, offsets, index["counts"])


def _map(path: Path, dtype: Any, length: int) -> Any:
    if path.stat().st_size != length * np.dtype(dtype).itemsize:
        raise UserError(f"{path}: {path.stat().st_size} bytes for {length} tokens; delete this cache folder")
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype, "r")) if length else np.empty(0, dtype)


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
