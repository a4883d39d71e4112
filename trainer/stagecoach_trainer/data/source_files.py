"""The files of a source: which of them are read, under which names, and which are not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stagecoach_api.references import RecordSource
from stagecoach_trainer.data.dataset_info import DATASET_INFO, named_set, read_entries
from stagecoach_trainer.data.messages import listed
from stagecoach_trainer.data.raw import known_suffixes, layout_of
from stagecoach_trainer.data.turns import TurnKeys
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.runtime.inputs import input_files

ABOUT_STEMS = frozenset({"readme", "license", "licence", "notice", "changelog", "citation", "requirements"})
"""Files next to the data that are about it."""

DESCRIPTIONS = frozenset({DATASET_INFO, "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files with which LLaMA-Factory and `datasets` describe the data next to them."""

NamedFiles = tuple[tuple[Path, str], ...]
"""Files with their names in messages, sorted by name."""


@dataclass(frozen=True)
class SourceFiles:
    """What is read for a source."""

    files: NamedFiles
    not_read: tuple[str, ...]
    """Names of the other files in the folder."""

    source: RecordSource
    """The source; for a set of LLaMA-Factory's `dataset_info.json`, with the layout and fields that it states."""

    keys: TurnKeys | None = None
    """Names with which turns are written, if they differ from the layout's."""


def source_files(path: Path, source: RecordSource) -> SourceFiles:
    """Return the files of a source that is fetched to `path`. Raises UserError if there is none to read."""
    if source.dataset is not None:
        return _named(path, source)
    if path.is_file():
        return SourceFiles(((path, (source.uri or path.name).rsplit("/", 1)[-1]),), (), source)
    entries = read_entries(path)
    if entries is not None:
        raise UserError(
            f"{source.uri}: the folder has LLaMA-Factory's {DATASET_INFO}; name one of its sets with `dataset` "
            f"({listed(sorted(entries))}), or give the URI of a data file"
        )
    return SourceFiles(*_data_files(path, source), source)


def _named(path: Path, source: RecordSource) -> SourceFiles:
    if path.is_file():
        raise UserError(f"{source.uri}: `dataset` names a set of a folder with a {DATASET_INFO}; give the folder's URI")
    found = named_set(path, source)
    file = path / found.file
    if file.is_dir():
        return SourceFiles(*_data_files(file, source), found.source, found.keys)
    if not file.is_file():
        raise UserError(f"{source.uri}/{DATASET_INFO}: {source.dataset}: there is no file {found.file} in this folder")
    return SourceFiles(((file, found.file),), (), found.source, found.keys)


def _data_files(folder: Path, source: RecordSource) -> tuple[NamedFiles, tuple[str, ...]]:
    """Return the files below a folder that are read, and the names of the others; hidden files are neither."""
    every = [(file, file.relative_to(folder).as_posix()) for file in input_files(folder)]
    visible = [(file, name) for file, name in every if not any(part[0] == "_" for part in name.split("/"))]
    data = [(file, name) for file, name in visible if _is_data(name)]
    data = data or [(file, name) for file, name in visible if _is_document(name)]
    if not data and len(visible) == 1:  # a file of an unknown suffix may show its layout by its first bytes
        data = visible
    if not data:
        there = f"there are: {listed(name for _, name in every)}" if every else "it is empty"
        raise UserError(
            f"{source.key}: no data files found ({there}); give a file, a glob or a folder with {known_suffixes()}"
        )
    kept = {name for _, name in data}
    return tuple(data), tuple(name for _, name in every if name not in kept)


def _is_data(name: str) -> bool:
    """Return whether a file of a folder is data. Markdown next to data is about it."""
    return _is_document(name) and PurePosixPath(name).suffix.lower() != ".md"


def _is_document(name: str) -> bool:
    path = PurePosixPath(name)
    is_text = path.suffix.lower() in (".md", ".txt")
    is_about = is_text and path.name.split(".")[0].lower() in ABOUT_STEMS
    return layout_of(Path(name)) is not None and path.name not in DESCRIPTIONS and not is_about
