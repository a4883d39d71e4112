"""Rows of tables: Parquet, CSV and TSV."""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stagecoach_trainer.data.raw import COMPRESSIONS, Layout, Raw, Readable, open_bytes
from stagecoach_trainer.runtime.errors import UserError

CHUNK_BYTES = 1 << 20
ROWS_PER_BATCH = 512
CSV_BLOCK_BYTES = 16 * 1024 * 1024
"""Bytes of CSV in memory at a time, and thereby the largest row."""

DELIMITERS = {Layout.CSV: ",", Layout.TSV: "\t"}

# -- Parquet -----------------------------------------------------------------------------------------------------------


def read_parquet(path: Path, name: str) -> Iterator[Raw]:
    """Yield the rows of a Parquet file. Raises UserError if it is damaged."""
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
            for batch in parquet.ParquetFile(source).iter_batches(batch_size=ROWS_PER_BATCH):
                for value in _rows(batch):
                    row += 1
                    yield Raw(row, value) if isinstance(value, dict) else Raw(row, error=str(value))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{name}: row {row + 1}: the Parquet file cannot be read: {error}") from error


def _rows(batch: Any) -> list[dict[str, Any] | str]:
    """Return a batch's rows; a row with a string that is not valid UTF-8 becomes an error message."""
    without_padding = {
        field.name: strip for field in batch.schema if (strip := _without_padding(field.type)) is not None
    }
    try:
        return [_stripped(row, without_padding) for row in batch.to_pylist(maps_as_pydicts="strict")]
    except UnicodeDecodeError:
        return [_row(batch.slice(index, 1), without_padding) for index in range(batch.num_rows)]


def _row(batch: Any, without_padding: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any] | str:
    try:
        return _stripped(batch.to_pylist(maps_as_pydicts="strict")[0], without_padding)
    except UnicodeDecodeError as error:
        return f"bad UTF-8 at byte {error.start}"


def _stripped(row: dict[str, Any], without_padding: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return row | {name: strip(row[name]) for name, strip in without_padding.items()}


def _without_padding(type_: Any) -> Callable[[Any], Any] | None:
    """Return a function that removes the nulls with which storage fills structs. None if the type has no struct.

    All values of a struct column have the keys of every row, so a key that a row lacks comes back as null. Nulls in
    lists, in maps and in JSON text are content.
    """
    from pyarrow import types

    if types.is_struct(type_):
        members = {field.name: _without_padding(field.type) for field in type_}
        return lambda value: _struct_without_padding(value, members)
    is_list = types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    if not is_list and not types.is_map(type_):
        return None
    strip = _without_padding(type_.value_type if is_list else type_.item_type)
    if strip is None:
        return None
    if is_list:
        return lambda value: value and [strip(held) for held in value]
    return lambda value: value and {key: strip(held) for key, held in value.items()}


def _struct_without_padding(value: Any, members: Mapping[str, Callable[[Any], Any] | None]) -> Any:
    if value is None:
        return None
    kept = {name: held for name, held in value.items() if held is not None}
    return {name: strip(held) if (strip := members.get(name)) else held for name, held in kept.items()}


# -- CSV ---------------------------------------------------------------------------------------------------------------


def read_csv(path: Path, name: str, layout: Layout) -> Iterator[Raw]:
    """Yield the rows below the header of a CSV or TSV file, all cells as strings. Row 1 is the header.

    Raises UserError for a header with a repeated column, or a row longer than `CSV_BLOCK_BYTES`.
    """
    import pyarrow

    bad: deque[tuple[int, str]] = deque()
    row = 1
    try:
        for batch in _csv_batches(path, name, layout, bad):
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                for value in batch.slice(start, ROWS_PER_BATCH).to_pylist():
                    row += 1
                    while bad and bad[0][0] <= row:  # rows with too many or too few cells are missing in the batch
                        yield Raw(bad[0][0], error=bad.popleft()[1])
                        row += 1
                    yield _decoded(value, row)
    except pyarrow.ArrowException as error:
        raise UserError(_csv_problem(name, row, str(error))) from error
    for number, problem in bad:
        yield Raw(number, error=problem)


def _csv_batches(path: Path, name: str, layout: Layout, bad: deque[tuple[int, str]]) -> Iterator[Any]:
    """Yield the table in parts, with cells as bytes, so that a cell that is not UTF-8 spoils its row only."""
    import pyarrow

    with _csv_reader(path, name, layout, {}, deque()) as reader:
        columns = [] if reader is None else _column_names(reader, name)
    if columns:
        with _csv_reader(path, name, layout, dict.fromkeys(columns, pyarrow.binary()), bad) as reader:
            yield from reader or ()


@contextmanager
def _csv_reader(
    path: Path, name: str, layout: Layout, types: Mapping[str, Any], bad: deque[tuple[int, str]]
) -> Iterator[Any]:
    """Open a CSV file; None if it is empty. `types`: of columns, instead of guessing; `bad`: receives uneven rows."""
    import pyarrow
    from pyarrow import csv

    def note(row: Any) -> str:
        bad.append((row.number or 0, f"{row.actual_columns} cells where the header has {row.expected_columns}"))
        return "skip"

    with open_bytes(path, name) as stream:
        whole = _WithLineEnd(stream)
        if whole.is_empty:
            yield None
            return
        yield csv.open_csv(
            pyarrow.PythonFile(whole, mode="r"),
            read_options=csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),  # threads hide row numbers
            parse_options=csv.ParseOptions(
                delimiter=DELIMITERS[layout], newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False, check_utf8=False),
        )


class _WithLineEnd:
    """A stream with a line end appended, without which Arrow takes a header alone for an empty file."""

    closed = False

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._first = stream.read(1)
        self._ended = False

    @property
    def is_empty(self) -> bool:
        return not self._first

    def read(self, size: int = CHUNK_BYTES, /) -> bytes:
        data = self._first + self._stream.read(size - len(self._first))
        self._first = b""
        if len(data) == size or self._ended:
            return data
        self._ended = True
        return data + b"\n"

    def close(self) -> None:
        """Leave the stream to its owner."""


def _column_names(reader: Any, name: str) -> list[str]:
    try:
        columns = list(reader.schema.names)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: row 1: the header is not UTF-8; convert the file to UTF-8") from error
    twice = sorted(column for column, count in Counter(columns).items() if count > 1)
    if twice:
        raise UserError(f"{name}: row 1: the column {twice[0]!r} occurs twice; rename one")
    return columns


def _decoded(row: Mapping[str, bytes], number: int) -> Raw:
    try:
        return Raw(number, {column: cell.decode("utf-8") for column, cell in row.items()})
    except UnicodeDecodeError as error:
        column = next(column for column, cell in row.items() if cell is error.object)
        return Raw(number, error=f"bad UTF-8 at byte {error.start} of the column {column!r}")


def _csv_problem(name: str, row: int, problem: str) -> str:
    if "straddling" in problem:
        return (
            f"{name}: after row {row}: a row is longer than {CSV_BLOCK_BYTES // 1024 // 1024} MiB; a quote may not be "
            "closed there: a quote inside a quoted cell is written twice"
        )
    return f"{name}: after row {row}: {problem}; fix the file there"
