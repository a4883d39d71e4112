"""Read the raw values of a file: JSON lines, JSON arrays, plain text, Parquet, CSV; plain or compressed (.gz, .zst).

Every reader streams: memory is bounded by `MAX_RECORD_BYTES`, whatever the file contains. A value that cannot be read
becomes a `Raw` with an error and its line, so that the caller decides whether to count it or to stop.
The errors are listed in the report of a `data` stage, so rewording one changes the artifact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from stagecoach_trainer.data.raw import (
    BYTE_ORDER_MARK,
    MAX_RECORD_BYTES,
    Layout,
    Raw,
    Readable,
    known_suffixes,
    layout_of,
    open_bytes,
)
from stagecoach_trainer.data.signatures import refuse_other_formats
from stagecoach_trainer.data.tables import read_csv, read_parquet
from stagecoach_trainer.runtime.errors import UserError

CHUNK_BYTES = 1 << 20


def read_values(path: Path, name: str, layout: Layout | None = None) -> Iterator[Raw]:
    """Yield the values of `path` in order.

    Args:
        path: The file.
        name: Name of the file in messages.
        layout: Its layout. Detected from the file's name, then from its first bytes, if it is None.

    Raises:
        UserError: The whole file is unreadable (a truncated archive, damaged Parquet, another format or encoding
            than its name's, an unknown layout).
    """
    layout = layout or layout_of(path) or _sniffed_layout(path, name)
    refuse_other_formats(path, name, layout)
    match layout:
        case Layout.PARQUET:
            yield from read_parquet(path, name)
        case Layout.CSV | Layout.TSV:
            yield from read_csv(path, name, layout)
        case Layout.TEXT:
            yield from _read_text(path, name)
        case Layout.JSON if not _first_line_is_json(path, name):
            yield from _read_json_values(path, name)
        case _:
            yield from _read_json_lines(path, name)


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


def _object_of(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError if a name occurs twice, of which Python would keep the last."""
    found = dict(members)
    if len(found) < len(members):
        names = [name for name, _ in members]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def parse_json(data: bytes, line: int) -> Raw:
    """Parse one JSON value; malformed bytes become a `Raw` with the reason."""
    try:
        text = data.decode("utf-8")
        return Raw(line, json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object_of))
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


# -- files with an unknown suffix --------------------------------------------------------------------------------------


def _sniffed_layout(path: Path, name: str) -> Layout:
    with open_bytes(path, name) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        return Layout.PARQUET
    if head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"{", b"["):
        return Layout.JSON
    refuse_other_formats(path, name, Layout.TEXT)
    raise UserError(
        f"{name}: neither the suffix nor the first bytes identify the file's layout; allowed are {known_suffixes()}: "
        "end its name in .txt if it is plain text"
    )
