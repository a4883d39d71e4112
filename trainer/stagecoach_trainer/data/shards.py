"""Write records as shards: `.jsonl.zst` files of bounded size, equal bytes for equal records.

Shuffling is external, in sequential passes: each record gets a key, the hash of (seed, record number), and is appended
to the spool file of the key's range; then each range is sorted in memory and written. The order is thus a uniform
permutation that depends only on the seed and the record numbers, and memory holds one range (about `RANGE_BYTES`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zstandard

from stagecoach_trainer.data.records import Record, record_to_json

ZSTD_LEVEL = 3
RANGE_BYTES = 64 * 1024 * 1024
MAX_RANGES = 512
"""Spool files open at the same time; a process may usually open 1,024 files."""

KEY_BYTES = 8
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a split."""

    path: str
    """Relative to the artifact's folder."""

    records: int
    bytes: int
    """Bytes of JSON before compression."""

    characters: int


class RecordSink(Protocol):
    """Destination of a split's records."""

    def add(self, record: Record) -> None: ...
    def close(self) -> list[Shard]: ...


class ShardWriter:
    """Writes records in the order in which they are added."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self._folder = folder
        self._split = split
        self._shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._lines: list[bytes] = []
        self._open: tuple[Any, Any] | None = None
        self._records = self._bytes = self._characters = 0

    def add(self, record: Record) -> None:
        """Write one record."""
        self.add_line(encode_line(record), len(record.content))

    def add_line(self, line: bytes, characters: int) -> None:
        """Write one record's JSON line, which ends in a newline."""
        if self._open is None:
            self._begin()
        self._lines.append(line)
        self._records += 1
        self._bytes += len(line)
        self._characters += characters
        # Lines are buffered because a compressor call per line costs more than compressing a short line.
        if len(self._lines) >= 512 or self._bytes >= self._shard_bytes:
            self._flush()
        if self._bytes >= self._shard_bytes:
            self._end()

    def close(self) -> list[Shard]:
        """Finish the last shard and return all shards."""
        if self._open is not None:
            self._end()
        return self._shards

    def _name(self) -> str:
        return f"{self._split}/part-{len(self._shards):05d}.jsonl.zst"

    def _begin(self) -> None:
        path = self._folder / self._name()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
        # Level and threads affect the compressed bytes: the level is fixed, and no threads are used.
        stream = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).stream_writer(file)
        self._open = (file, stream)

    def _flush(self) -> None:
        if self._open is not None and self._lines:
            self._open[1].write(b"".join(self._lines))
            self._lines = []

    def _end(self) -> None:
        self._flush()
        if self._open is not None:
            self._open[1].close()  # closes the file too
        self._open = None
        self._shards.append(Shard(self._name(), self._records, self._bytes, self._characters))
        self._records = self._bytes = self._characters = 0


class ShufflingWriter:
    """Writes records in a random order that the seed determines.

    Args:
        writer: Destination of the shuffled records.
        spool: A folder for the ranges; `close` removes it.
        seed: The order's seed.
        expected_bytes: Estimate of all records' bytes; sets the number of ranges. The order does not depend on it.
        on_range: Called with (ranges written, number of ranges) before each range is written.
    """

    def __init__(
        self,
        writer: ShardWriter,
        spool: Path,
        seed: int,
        expected_bytes: int,
        on_range: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self._writer = writer
        self._spool = spool
        self._on_range = on_range
        self._key = hashlib.sha256(f"order:{seed}".encode()).digest()
        self._num_ranges = max(1, min(MAX_RANGES, -(-expected_bytes // RANGE_BYTES)))
        spool.mkdir(parents=True, exist_ok=True)
        self._paths = [spool / f"range-{index:04d}" for index in range(self._num_ranges)]
        self._files = [path.open("wb") for path in self._paths]
        self._number = 0

    def add(self, record: Record) -> None:
        # Big-endian keys sort as bytes in the order of their values, so sorting range after range sorts all records.
        number = self._number.to_bytes(8, "big")
        self._number += 1
        key = hashlib.blake2b(number, digest_size=KEY_BYTES, key=self._key).digest()
        # The key as a fraction of 2^64, scaled to the number of ranges: each range has an interval of keys.
        index = (int.from_bytes(key, "big") * self._num_ranges) >> (8 * KEY_BYTES)
        line = encode_line(record)
        sizes = len(line).to_bytes(_LENGTH_BYTES, "big") + len(record.content).to_bytes(_LENGTH_BYTES, "big")
        self._files[index].write(b"".join((key, number, sizes, line)))

    def close(self) -> list[Shard]:
        for file in self._files:
            file.close()
        for index, path in enumerate(self._paths):
            self._on_range(index, self._num_ranges)
            # One range at a time in memory.
            for _, line, characters in sorted(_read_spool(path.read_bytes())):
                self._writer.add_line(line, characters)
            path.unlink()
        self._spool.rmdir()
        return self._writer.close()


def _read_spool(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Yield (key and number, line, characters); the first member is unique, so sorting never compares lines."""
    position = 0
    while position < len(data):
        size_at = position + KEY_BYTES + 8
        line_at = size_at + 2 * _LENGTH_BYTES
        size = int.from_bytes(data[size_at : size_at + _LENGTH_BYTES], "big")
        characters = int.from_bytes(data[size_at + _LENGTH_BYTES : line_at], "big")
        yield data[position:size_at], data[line_at : line_at + size], characters
        position = line_at + size


_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def encode_line(record: Record) -> bytes:
    """Return a record's canonical JSON, ending in a newline."""
    return (_ENCODE(record_to_json(record)) + "\n").encode()


def split_index(shards: Iterable[Shard]) -> dict[str, Any]:
    """Return the entry of a split in `index.json`."""
    shards = list(shards)
    return {
        "shards": [
            {"path": s.path, "records": s.records, "bytes": s.bytes, "characters": s.characters} for s in shards
        ],
        "records": sum(s.records for s in shards),
        "bytes": sum(s.bytes for s in shards),
        "characters": sum(s.characters for s in shards),
    }
