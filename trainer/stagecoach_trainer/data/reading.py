"""Read the records of a `data` artifact's split, or of files in any layout, one by one, in order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from stagecoach_api.references import FieldMapping, Format, RecordSource, Reference, Split
from stagecoach_trainer.data.files import read_values
from stagecoach_trainer.data.formats import detect_format, parser_for
from stagecoach_trainer.data.messages import listed, shortened
from stagecoach_trainer.data.notes import Notes, note_empty_file, note_files, note_record, warn_of_notes
from stagecoach_trainer.data.nulls import without_padding
from stagecoach_trainer.data.preferences import canonical_preferences
from stagecoach_trainer.data.raw import Layout, Raw, layout_of
from stagecoach_trainer.data.records import PREFERENCES, Record, RecordError
from stagecoach_trainer.data.source_files import SourceFiles, source_files
from stagecoach_trainer.data.turns import Parse
from stagecoach_trainer.runtime.errors import UserError

INDEX = "index.json"
"""A `data` artifact's table of contents."""


class Warns(Protocol):
    """The part of `Progress` that reading needs."""

    def warn(self, text: str) -> None: ...


class Fetches(Protocol):
    """The part of a `StageContext` that reading needs."""

    @property
    def progress(self) -> Warns: ...

    def fetch(self, reference: Reference) -> Path: ...


@dataclass(frozen=True, slots=True)
class Malformed:
    """A value that could not be read as a record."""

    where: str
    """`file:line`."""

    reason: str
    looks_like: Format | None = None
    """Another layout that the value fits. None if there is none."""

    source: str = ""
    """Label of its source."""


def read_records(context: Fetches, source: RecordSource, notes: Notes | None = None) -> Iterator[Record]:
    """Yield the records of `source`, in order.

    `notes` counts what is not read, or may not be meant, for the caller to report. Without it, that becomes a warning
    when reading ends, so that no reader leaves it out.

    Raises:
        UserError: A record is malformed (the message names file and line), or the split or the files are missing.
    """
    if notes is None:
        own: Notes = Counter()
        try:
            yield from read_records(context, source, own)
        finally:  # a reader may stop before the end
            warn_of_notes(context.progress.warn, own, source.label)
        return
    for item in read_path(context.fetch(source), source, notes):
        if isinstance(item, Malformed):
            advice = proposal(item.looks_like, source.format)
            raise UserError(
                f"{item.where}: {item.reason}; {advice or 'a `data` stage can count and leave out malformed records'}"
            )
        yield item


def proposal(looks_like: Format | None, format_: Format) -> str:
    """Return what to do about records that fit another layout; empty if they fit none."""
    if looks_like is None:
        return ""
    if format_ is Format.AUTO:
        return f"it looks like `{looks_like}`, unlike the first record: make one source for each layout"
    return f"it looks like `{looks_like}`: set `format: {looks_like}`"


def read_path(path: Path, source: RecordSource, notes: Notes | None = None) -> Iterator[Record | Malformed]:
    """Yield the records of a source that is fetched to `path`, and malformed ones, which count against `maxSamples`.

    `notes` counts what is not read, or may not be meant.
    """
    notes = Counter() if notes is None else notes
    if path.is_dir() and (path / INDEX).is_file():
        records, most = _read_artifact(path, source), source.max_samples
    else:
        found = source_files(path, source)
        note_files(notes, found.not_read)
        records, most = _read_files(found, notes), found.source.max_samples
    for number, record in enumerate(records):
        if most is not None and number >= most:
            return
        if isinstance(record, Record):
            note_record(notes, record)
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
            record = _parsed(raw, parse, f"{source.label}/{name}:{raw.line}")
            if isinstance(record, Record):  # whose fields are all ours
                record = replace(record, source=str(raw.value.get("source", source.label)), unread=())
            yield record


def _artifact_parser(kind: str) -> Parse:
    if kind == PREFERENCES:
        return canonical_preferences
    return parser_for(Format.TEXT if kind == "text" else Format.MESSAGES, FieldMapping(), {})


# -- files -------------------------------------------------------------------------------------------------------------


def _read_files(found: SourceFiles, notes: Notes) -> Iterator[Record | Malformed]:
    source = found.source
    detected: Format | None = None if source.format is Format.AUTO else source.format
    for file, name in found.files:
        layout = layout_of(file)
        parse: Parse | None = None
        if layout is Layout.TEXT:
            detected = _text_format(detected, name)
            parse = parser_for(Format.TEXT, FieldMapping(), {})
        whole: Raw | None = None
        for whole in read_values(file, name, layout):
            raw, nulls = _without(whole, source.fields)
            where = f"{name}:{whole.line}"
            if parse is None and raw.error is None and isinstance(raw.value, Mapping):
                detected = detected or _detected(raw.value, source.fields, where)
                parse = parser_for(detected, source.fields, raw.value, found.keys)
            record = _parsed(raw, parse, where)
            if isinstance(record, Record):
                yield replace(record, source=source.label, nulls=nulls)
            else:
                other = _other_layout(raw, source.fields, detected)
                yield replace(_with_null_names(record, whole), looks_like=other, source=source.label)
        if whole is None:
            note_empty_file(notes, name)


def _without(raw: Raw, fields: FieldMapping) -> tuple[Raw, tuple[str, ...]]:
    """Return a value without the fields that its source leaves out knowingly and without filled-in nulls, and notes."""
    if not isinstance(raw.value, Mapping):
        return raw, ()
    value = {name: held for name, held in raw.value.items() if name not in fields.ignore}
    cleaned, nulls = without_padding(value, fields.tools)
    return replace(raw, value=cleaned), nulls


def _with_null_names(malformed: Malformed, raw: Raw) -> Malformed:
    """Return it with the names of fields that are null: its reason may call them missing."""
    names = [name for name, held in raw.value.items() if held is None] if isinstance(raw.value, Mapping) else []
    return replace(malformed, reason=f"{malformed.reason} (null: {listed(names)})") if names else malformed


def _text_format(detected: Format | None, name: str) -> Format:
    if detected not in (None, Format.TEXT):
        raise UserError(f"{name}: a text file has no `{detected}` records; give JSON or Parquet, or `format: text`")
    return Format.TEXT


def _detected(value: Mapping[str, Any], fields: FieldMapping, where: str) -> Format:
    try:
        return detect_format(value, fields)
    except RecordError as error:
        raise UserError(f"{where}: {error}") from error


def _other_layout(raw: Raw, fields: FieldMapping, format_: Format | None) -> Format | None:
    """Return the layout of a value that is malformed in `format_`. None if it fits no other one."""
    if not isinstance(raw.value, Mapping):
        return None
    try:
        found = detect_format(raw.value, fields)
    except RecordError:
        return None
    return None if found is format_ else found


def _parsed(raw: Raw, parse: Parse | None, where: str) -> Record | Malformed:
    if raw.error is not None:
        return Malformed(where, raw.error)
    if not isinstance(raw.value, Mapping) or parse is None:
        return Malformed(where, f"a record must be an object, got {type(raw.value).__name__}")
    try:
        return replace(parse(raw.value), where=where)
    except RecordError as problem:
        return Malformed(where, shortened(str(problem)))
