"""Read the raw values of a file: JSON lines, JSON arrays, plain text and Parquet, each plain or compressed (.gz, .zst).

Every reader streams: memory is bounded by `MAX_RECORD_BYTES`, whatever the file contains. A value that cannot be read
becomes a `Raw` with an error and its line, so that the caller decides whether to count it or to stop.
The errors are listed in the report of a `data` stage, so rewording one changes the artifact.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, Protocol

from stagecoach_trainer.runtime.errors import UserError

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""Size limit of a line or JSON value; a longer one is malformed."""

CHUNK_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PARQUET_ROWS_PER_BATCH = 512
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Readable(Protocol):
    """A binary stream that is read sequentially."""

    def read(self, size: int = -1, /) -> bytes: ...


class Layout(Enum):
    """How a file's bytes are split into values."""

    LINES = "JSON lines"
    JSON = "JSON"
    TEXT = "text"
    PARQUET = "Parquet"


LAYOUTS = {
    ".jsonl": Layout.LINES,
    ".ndjson": Layout.LINES,
    ".json": Layout.JSON,
    ".txt": Layout.TEXT,
    ".text": Layout.TEXT,
    ".md": Layout.TEXT,
    ".parquet": Layout.PARQUET,
}


@dataclass(frozen=True, slots=True)
class Raw:
    """A value of a file, or the reason why it could not be read."""

    line: int
    """Line on which it begins, from 1; in Parquet, its row."""

    value: Any = None
    error: str | None = None


def layout_of(path: Path) -> Layout | None:
    """Return the layout by a file's suffix, ignoring `.gz` and `.zst`. None if the suffix is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return LAYOUTS.get(suffixes[-1]) if suffixes else None


def read_values(path: Path, name: str, layout: Layout | None = None) -> Iterator[Raw]:
    """Yield the values of `path` in order.

    Args:
        path: The file.
        name: Name of the file in messages.
        layout: Its layout. Detected from the file's name, then from its first bytes, if it is None.

    Raises:
        UserError: The whole file is unreadable (a truncated archive, damaged Parquet, an unknown layout).
    """
    layout = layout or layout_of(path) or _sniffed_layout(path, name)
    if layout is Layout.PARQUET:
        yield from _read_parquet(path, name)
    elif layout is Layout.TEXT:
        yield from _read_text(path, name)
    elif layout is Layout.LINES or _first_line_is_json(path, name):
        yield from _read_json_lines(path, name)
    else:
        yield from _read_json_values(path, name)


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

    def __init__(self, stream: Any, name: str) -> None:
        self._stream = stream
        self._name = name

    def read(self, size: int = -1, /) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except OSError as error:
            raise UserError(f"{self._name}: the archive is damaged: {error}; fetch or compress it again") from error


# -- lines -------------------------------------------------------------------------------------------------------------


def _read_lines(stream: Readable) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, line without its end); the line is None if it is longer than `MAX_RECORD_BYTES`."""
    number = 0
    parts: list[bytes] = []
    size = 0
    while chunk := stream.read(CHUNK_BYTES):
        lines = chunk.split(b"\n")
        for line in lines[:-1]:
            number += 1
            whole = b"".join([*parts, line]) if parts else line
            too_long = size + len(line) > MAX_RECORD_BYTES
            parts, size = [], 0
            if number == 1:
                whole = whole.removeprefix(BYTE_ORDER_MARK)
            yield number, None if too_long else whole
        # The last part has no line end yet, so it is joined with the first line of the next chunk.
        size += len(lines[-1])
        if size > MAX_RECORD_BYTES:
            parts = [b""]  # drop the line but keep its size, so that its end still reports it as too long
        elif lines[-1]:
            parts.append(lines[-1])
    if size:
        last = b"".join(parts)
        yield (
            number + 1,
            None if size > MAX_RECORD_BYTES else last.removeprefix(BYTE_ORDER_MARK if number == 0 else b""),
        )


def _too_long() -> str:
    return f"longer than {MAX_RECORD_BYTES // 1024 // 1024} MiB"


def _read_json_lines(path: Path, name: str) -> Iterator[Raw]:
    with open_bytes(path, name) as stream:
        for number, line in _read_lines(stream):
            if line is None:
                yield Raw(number, error=_too_long())
            elif line.strip():
                yield parse_json(line, number)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def parse_json(data: bytes, line: int) -> Raw:
    """Parse one JSON value; malformed bytes become a `Raw` with the reason."""
    try:
        return Raw(line, json.loads(data.decode("utf-8"), parse_constant=_refuse_constant))
    except UnicodeDecodeError as error:
        return Raw(line, error=f"bad UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Raw(line, error=f"malformed JSON: {error.msg.removesuffix(' at')} at character {error.pos}")
    except RecursionError:
        return Raw(line, error="malformed JSON: nested too deeply")
    except ValueError as error:
        return Raw(line, error=f"malformed JSON: {error}")


# -- JSON values over several lines ------------------------------------------------------------------------------------

# A complete string, a bracket, or the quote of a string that the window cuts off. Possessive quantifiers (`*+`) keep
# the search linear: without them, a long unfinished string is rescanned by backtracking.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]"]', re.DOTALL)
_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*")
_GAP = re.compile(rb"[\s,]*")
_GARBAGE = re.compile(rb"[^\n{\]]*")
_DEPTH = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}


def _first_line_is_json(path: Path, name: str) -> bool:
    """Return whether a `.json` file holds JSON lines, rather than an array or values over several lines."""
    with open_bytes(path, name) as stream:
        for number, line in _read_lines(stream):
            if line is None:
                return False
            if line.strip():
                return isinstance(parse_json(line, number).value, dict)
    return False


class _Scanner:
    """A window of a stream that starts at the next value."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._data = b""
        self._start = 0
        self.line = 1
        self.ended = False

    @property
    def first(self) -> bytes:
        """The window's first byte; empty at the end of the file."""
        return self._data[self._start : self._start + 1]

    def more(self) -> None:
        """Extend the window, at least doubling it so that rescanning it costs linear time in total."""
        rest = self._data[self._start :]
        chunk = self._stream.read(max(CHUNK_BYTES, len(rest)))
        self.ended = not chunk
        self._data, self._start = rest + chunk, 0

    def skip(self, pattern: re.Pattern[bytes]) -> None:
        """Skip what matches, extending the window as long as the match reaches its end."""
        while True:
            match = pattern.match(self._data, self._start)
            self._take(match.end() if match else self._start)
            if self.first or self.ended:
                return
            self.more()

    def skip_byte(self) -> None:
        self._take(self._start + 1)

    def _take(self, end: int) -> bytes:
        """Remove the window's start up to the index `end` and return it."""
        taken, self._start = self._data[self._start : end], end
        self.line += taken.count(b"\n")
        return taken

    def take_value(self) -> bytes | None:
        """Remove one object, from its `{` to the closing `}`, and return it. None if its end is not found."""
        depth, position = 0, self._start
        while True:
            match = _TOKEN.search(self._data, position)
            if match is None or match.group() == b'"':  # the window ends, perhaps within a string
                scanned = (match.start() if match else len(self._data)) - self._start
                if self.ended or len(self._data) - self._start > MAX_RECORD_BYTES:
                    return None
                self.more()
                position = scanned  # `more` moves the window to index 0, so positions are relative to it
                continue
            position = match.end()
            depth += _DEPTH.get(match.group(), 0)
            if depth == 0:
                return self._take(position)


def _read_json_values(path: Path, name: str) -> Iterator[Raw]:
    """Yield the objects of an array, or of a sequence of objects, over any number of lines."""
    with open_bytes(path, name) as stream:
        scanner = _Scanner(stream)
        scanner.skip(_START)
        is_array = scanner.first == b"["
        if is_array:
            scanner.skip_byte()
        while True:
            scanner.skip(_GAP)
            if not scanner.first or (is_array and scanner.first == b"]"):
                break
            yield _next_value(scanner, name)
        if is_array:
            yield from _array_end(scanner)


def _next_value(scanner: _Scanner, name: str) -> Raw:
    line = scanner.line
    if scanner.first != b"{":
        scanner.skip_byte()
        scanner.skip(_GARBAGE)
        return Raw(line, error="malformed JSON: expected an object")
    value = scanner.take_value()
    if value is None:
        raise UserError(
            f"{name}:{line}: the end of the JSON object that begins here was not found "
            f"within {MAX_RECORD_BYTES // 1024 // 1024} MiB, so nothing after it can be read; fix the file there"
        )
    return parse_json(value, line)


def _array_end(scanner: _Scanner) -> Iterator[Raw]:
    if not scanner.first:
        yield Raw(scanner.line, error="malformed JSON: the array is not closed by ]; the file may be cut short")
        return
    scanner.skip_byte()
    scanner.skip(_GAP)
    if scanner.first:
        yield Raw(scanner.line, error="malformed JSON: text behind the closing ]")


# -- plain text --------------------------------------------------------------------------------------------------------


def _read_text(path: Path, name: str) -> Iterator[Raw]:
    """Yield `{"text": …}` for each document.

    Blank lines separate documents. A file with no blank line between its lines has one document per line.
    """
    by_line = not _has_blank_line(path, name)
    with open_bytes(path, name) as stream:
        start, document = 0, list[bytes]()
        size = 0
        for number, line in _read_lines(stream):
            if line is None:
                yield Raw(number, error=_too_long())
                continue
            if line.strip():
                start = start or number
                size += len(line) + 1
                if size <= MAX_RECORD_BYTES:
                    document.append(line.rstrip(b"\r"))
            if start and (by_line or not line.strip()):
                yield _text_document(document, start, size)
                start, document, size = 0, [], 0
        if start:
            yield _text_document(document, start, size)


def _has_blank_line(path: Path, name: str) -> bool:
    with open_bytes(path, name) as stream:
        seen_text = blank_after_text = False
        for _, line in _read_lines(stream):
            is_blank = line is not None and not line.strip()
            if not is_blank and blank_after_text:
                return True
            seen_text = seen_text or not is_blank
            blank_after_text = seen_text and is_blank
    return False


def _text_document(lines: list[bytes], start: int, size: int) -> Raw:
    if size > MAX_RECORD_BYTES:
        return Raw(start, error=_too_long())
    try:
        return Raw(start, {"text": b"\n".join(lines).decode("utf-8")})
    except UnicodeDecodeError as error:
        line = start + error.object[: error.start].count(b"\n")
        return Raw(line, error=f"bad UTF-8 at byte {error.start} of the document")


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, name: str) -> Iterator[Raw]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as spool:
        source: Any = str(path)
        if path.suffix.lower() in COMPRESSIONS:  # Parquet is read from its end, so it is decompressed first
            with open_bytes(path, name) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    spool.write(chunk)
            source = spool
        row = 0
        try:
            for batch in parquet.ParquetFile(source).iter_batches(batch_size=PARQUET_ROWS_PER_BATCH):
                for value in _parquet_rows(batch):
                    row += 1
                    yield Raw(row, value) if isinstance(value, dict) else Raw(row, error=str(value))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{name}: row {row + 1}: the Parquet file cannot be read: {error}") from error


def _parquet_rows(batch: Any) -> list[dict[str, Any] | str]:
    """Return a batch's rows; a row with a string that is not valid UTF-8 becomes an error message."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_parquet_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _parquet_row(row: Any) -> dict[str, Any] | str:
    try:
        return dict(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return f"bad UTF-8 at byte {error.start}"


# -- files with an unknown suffix --------------------------------------------------------------------------------------


def _sniffed_layout(path: Path, name: str) -> Layout:
    with open_bytes(path, name) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        return Layout.PARQUET
    if head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"{", b"["):
        return Layout.JSON
    allowed = ", ".join(sorted(LAYOUTS))
    raise UserError(
        f"{name}: neither the suffix nor the first bytes identify the file's layout; "
        f"allowed are {allowed}, each also with .gz or .zst"
    )
