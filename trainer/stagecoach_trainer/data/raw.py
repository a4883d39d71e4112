"""Raw values of files, the layouts of files by their names, and opening them decompressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from stagecoach_trainer.runtime.errors import UserError

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""Size limit of a line or JSON value; a longer one is malformed."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Readable(Protocol):
    """A binary stream that is read sequentially."""

    def read(self, size: int = -1, /) -> bytes: ...


class Layout(Enum):
    """How a file's bytes are split into values."""

    LINES = "JSON lines"
    JSON = "JSON"
    TEXT = "text"
    PARQUET = "Parquet"
    CSV = "CSV"
    TSV = "TSV"


LAYOUTS = {
    ".jsonl": Layout.LINES,
    ".ndjson": Layout.LINES,
    ".json": Layout.JSON,
    ".txt": Layout.TEXT,
    ".text": Layout.TEXT,
    ".md": Layout.TEXT,
    ".parquet": Layout.PARQUET,
    ".csv": Layout.CSV,
    ".tsv": Layout.TSV,
}


@dataclass(frozen=True, slots=True)
class Raw:
    """A value of a file, or the reason why it could not be read."""

    line: int
    """Line on which it begins, from 1; in Parquet and CSV, its row."""

    value: Any = None
    error: str | None = None


def layout_of(path: Path) -> Layout | None:
    """Return the layout by a file's suffix, ignoring `.gz` and `.zst`. None if the suffix is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return LAYOUTS.get(suffixes[-1]) if suffixes else None


def known_suffixes() -> str:
    """Return the suffixes of readable files, for a message."""
    return f"{', '.join(sorted(LAYOUTS))}, each also with .gz or .zst"


@contextmanager
def open_bytes(path: Path, name: str) -> Iterator[Readable]:
    """Open a file, decompressing it according to its suffix. Raises UserError for a damaged or truncated archive."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        with path.open("rb") as plain:
            yield plain
        return
    import pyarrow  # its streams detect a truncated archive; zstandard's reader does not

    with pyarrow.input_stream(str(path), compression=compression) as stream:
        yield _CheckedStream(stream, name)


class _CheckedStream:
    """A decompressed stream whose errors name the file."""

    closed = False

    def __init__(self, stream: Any, name: str) -> None:
        self._stream = stream
        self._name = name

    def read(self, size: int = -1, /) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except OSError as error:
            raise UserError(f"{self._name}: the archive is damaged: {error}; fetch or compress it again") from error
