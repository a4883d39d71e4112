"""From a file to a run: YAML, overrides, validation. Every problem has the file and the line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stagecoach_api.draft import stage_names
from stagecoach_api.fields import FieldPath, format_path
from stagecoach_api.problems import MISSING, InvalidRun, Problem
from stagecoach_api.reading.overrides import apply_overrides
from stagecoach_api.reading.validation import validate_with_paths
from stagecoach_api.reading.yaml_reader import MAX_BYTES, read_yaml
from stagecoach_api.spec import TrainingRun


@dataclass(frozen=True)
class LoadedRun:
    """A valid run and where it came from."""

    run: TrainingRun

    source: Path | None
    """The run file; None if the run was given as text."""

    folder: Path
    """Folder of the run file, absolute: relative inputs are resolved against it if `storage.inputs` is unset."""

    document: Mapping[str, Any]
    """The run as written, overrides applied: plain JSON values without defaults."""

    lines: Mapping[FieldPath, int] = field(default_factory=dict)
    """Line of every field's name and every list item of the file."""

    origins: Mapping[FieldPath, str] = field(default_factory=dict)
    """The overrides, by the path of the field each has set."""

    def located(self, path: FieldPath, problem: Problem) -> Problem:
        """Return a problem of the field at `path` with its place: the line of the file, or the override."""
        return _locate(path, problem, self.lines, self.origins, str(self.source) if self.source is not None else "")

    def problem(self, path: FieldPath, value: Any, rule: str, remedy: str) -> Problem:
        """Return a problem of the field at `path`, with its place."""
        name = format_path(path, stage_names(self.document))
        return self.located(path, Problem(name, value, rule, remedy))


def load_run(path: Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Return the run in the YAML (or JSON) file at `path`, with `overrides` (`PATH=VALUE`) applied in their order.

    Raises `InvalidRun` with all problems, each with file and line.
    """
    path = Path(path)
    return _load(_read_text(path), path, overrides)


def parse_run(text: str, overrides: Sequence[str] = (), source: Path | None = None) -> LoadedRun:
    """Like `load_run`, for text. `source` names the file it came from, if any."""
    return _load(text, source, overrides)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rule, remedy = f"must be UTF-8, and byte {error.start} is not", "save the file as UTF-8"
    except IsADirectoryError:
        rule, remedy = "is a folder", "name the run file in it"
    except FileNotFoundError:
        rule, remedy = "no such file", "check the path"
    except OSError as error:
        rule, remedy = f"cannot be read: {error.strerror}", "check the path and its permissions"
    raise InvalidRun([Problem("", MISSING, rule, remedy, None, str(path))])


def _load(text: str, source: Path | None, overrides: Sequence[str]) -> LoadedRun:
    label = str(source) if source is not None else ""
    read = read_yaml(text, label)
    if not isinstance(read.value, dict):
        raise InvalidRun([Problem("", read.value, "must be a mapping", "write `apiVersion`, `kind`, …", 1, label)])
    document, origins = apply_overrides(read.value, overrides)
    run, found = validate_with_paths(document)
    located = [(path, _locate(path, problem, read.lines, origins, label)) for path, problem in found]
    names = stage_names(document)
    unreadable = [(path, replace(problem, path=format_path(path, names))) for path, problem in read.problems]
    problems = _merge(unreadable, located)
    if run is None or problems:
        raise InvalidRun(problems)
    folder = (source.parent if source is not None else Path()).resolve()
    return LoadedRun(run, source, folder, document, read.lines, origins)


def _locate(
    path: FieldPath, problem: Problem, lines: Mapping[FieldPath, int], origins: Mapping[FieldPath, str], label: str
) -> Problem:
    """Add the line of the nearest part that the file has, or the override the value came from."""
    for length in range(len(path), -1, -1):
        part = path[:length]
        if part in origins:
            return replace(problem, source=origins[part])
        if part in lines:
            return replace(problem, source=label, line=lines[part])
    return replace(problem, source=label)


def _merge(
    unreadable: Sequence[tuple[FieldPath, Problem]], found: Sequence[tuple[FieldPath, Problem]]
) -> list[Problem]:
    """Sort by line, problems without one last. The schema's problems of unreadable values are left out."""
    paths = {path for path, _ in unreadable}
    return in_order([problem for _, problem in unreadable] + [problem for path, problem in found if path not in paths])


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems by their line, those without one last."""
    return sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0))
