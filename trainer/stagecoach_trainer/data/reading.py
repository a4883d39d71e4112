"""Read the records of a `data` artifact's split, or of files in any layout, one by one, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from stagecoach_api.references import FieldMapping, Format, RecordSource, Reference, Split
from stagecoach_trainer.data.files import read_values
from stagecoach_trainer.data.formats import detect_format, parser_for
from stagecoach_trainer.data.preferences import canonical_preferences
from stagecoach_trainer.data.raw import Layout, layout_of
from stagecoach_trainer.data.records import PREFERENCES, Record, RecordError
from stagecoach_trainer.data.turns import Parse
from stagecoach_trainer.runtime.errors import UserError

INDEX = "index.json"
"""A `data` artifact's table of contents."""


class Fetches(Protocol):
    """The part of a `StageContext` that reading needs."""

    def fetch(self, reference: Reference) -> Path: ...


@dataclass(frozen=True, slots=True)
class Malformed:
    """A value that could not be read as a record."""

    where: str
    """`file:line`."""

    reason: str


def read_records(context: Fetches, source: RecordSource) -> Iterator[Record]:
    """Yield the records of `source`, in order.

    Raises:
        UserError: A record is malformed (the message names file and line), or the split or the files are missing.
    """
    for item in read_raw_records(context, source):
        if isinstance(item, Malformed):
            raise UserError(f"{item.where}: {item.reason}; a `data` stage can count and leave out malformed records")
        yield item


def read_raw_records(context: Fetches, source: RecordSource) -> Iterator[Record | Malformed]:
    """Like `read_records`, but yield malformed records instead of raising. They count against `maxSamples` too."""
    return read_path(context.fetch(source), source)


def read_path(path: Path, source: RecordSource) -> Iterator[Record | Malformed]:
    """Like `read_raw_records`, for a source that is already fetched to `path`."""
    is_artifact = path.is_dir() and (path / INDEX).is_file()
    records = _read_artifact(path, source) if is_artifact else _read_files(path, source)
    for number, record in enumerate(records):
        if source.max_samples is not None and number >= source.max_samples:
            return
        yield record


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of the `data` artifact in `folder`. Raises UserError if it is missing or malformed."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return {"format": index["format"], "splits": dict(index["splits"]), "sources": dict(index["sources"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX}: not the index of a `data` artifact: {error!r}") from error


# -- data artifacts ----------------------------------------------------------------------------------------------------


def _read_artifact(folder: Path, source: RecordSource) -> Iterator[Record | Malformed]:
    index = read_index(folder)
    split = index["splits"].get(source.split.value)
    if not split or not split["records"]:
        advice = "; set `heldOutShare` in the `data` stage" if source.split is Split.HELD_OUT else ""
        raise UserError(f"{source.key}: the data set has no records in its split `{source.split.value}`{advice}")
    parse = _artifact_parser(index["format"])
    for shard in split["shards"]:
        name = shard["path"]
        for raw in read_values(folder / name, f"{source.label}/{name}", Layout.LINES):
            record = _parsed(raw.value, raw.error, parse, f"{source.label}/{name}:{raw.line}")
            if isinstance(record, Record):
                record = replace(record, source=str(raw.value.get("source", source.label)))
            yield record


def _artifact_parser(kind: str) -> Parse:
    if kind == PREFERENCES:
        return canonical_preferences
    return parser_for(Format.TEXT if kind == "text" else Format.MESSAGES, FieldMapping(), {})


# -- files -------------------------------------------------------------------------------------------------------------


def _read_files(path: Path, source: RecordSource) -> Iterator[Record | Malformed]:
    detected: Format | None = None if source.format is Format.AUTO else source.format
    for file, name in _data_files(path, source):
        layout = layout_of(file)
        if layout is Layout.TEXT:
            detected = _text_format(detected, name)
            parse: Parse | None = parser_for(Format.TEXT, FieldMapping(), {})
        else:
            parse = None
        for raw in read_values(file, name, layout):
            where = f"{name}:{raw.line}"
            if parse is None and raw.error is None and isinstance(raw.value, Mapping):
                detected = detected or _detected(raw.value, source.fields, where)
                parse = parser_for(detected, source.fields, raw.value)
            record = _parsed(raw.value, raw.error, parse, where)
            yield replace(record, source=source.label) if isinstance(record, Record) else record


def _data_files(path: Path, source: RecordSource) -> list[tuple[Path, str]]:
    """Return (file, name in messages) of a source's files, sorted by name."""
    if path.is_file():
        return [(path, (source.uri or path.name).rsplit("/", 1)[-1])]
    files = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )
    if len(files) > 1:  # a folder may contain a README or a licence next to the data
        files = [(name, file) for name, file in files if layout_of(file) and not name.lower().endswith(".md")] or files
    if not files:
        raise UserError(f"{source.key}: no files found; give a file, a glob or a folder with data in it")
    return [(file, name) for name, file in files]


def _text_format(detected: Format | None, name: str) -> Format:
    if detected not in (None, Format.TEXT):
        raise UserError(f"{name}: a text file has no `{detected}` records; give JSON or Parquet, or `format: text`")
    return Format.TEXT


def _detected(value: Mapping[str, Any], fields: FieldMapping, where: str) -> Format:
    try:
        return detect_format(value, fields)
    except RecordError as error:
        raise UserError(f"{where}: {error}") from error


def _parsed(value: Any, error: str | None, parse: Parse | None, where: str) -> Record | Malformed:
    if error is not None:
        return Malformed(where, error)
    if not isinstance(value, Mapping) or parse is None:
        return Malformed(where, f"a record must be an object, got {type(value).__name__}")
    try:
        return replace(parse(value), where=where)
    except RecordError as problem:
        return Malformed(where, str(problem))
