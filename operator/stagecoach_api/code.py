"""Identity of the code that makes artifacts: a hash of the trainer package, equal for a checkout and a wheel.

It is part of every stage digest, so anything that enters it causes stages to run again. Only what can change a result
enters: the syntax trees of the Python files, the data files the code reads and the versions that the lock pins.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TRAINER_PACKAGE = "stagecoach_trainer"
LOCK_FILE = "requirements.lock"

DATA_SUFFIXES = frozenset({".jinja"})
"""Data files that count, by their bytes: a named chat template decides which text a model is trained on, and a stage's
configuration holds the template's name only."""

_SKIPPED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
"""Fields of syntax nodes that follow from the rest (`ctx`) or change nothing (the `u` of `u""`, comments)."""


class UnparsableCode(ValueError):
    """A Python file of the trainer package cannot be parsed."""


def code_identity(package: Path | None = None) -> str:
    """Return the SHA-256 (hex) over the names and the effective content of the trainer package's files.

    `package`: the package's folder. If None, the installed package, which is found without importing it. What counts:

    - `*.py`: the syntax tree (see `python_content`). Comments, docstrings and formatting do not count.
    - `*.jinja`: the bytes.
    - `requirements.lock`: the pins (see `lock_content`).

    A file's path below the package counts; the package's own location, bytecode and all other files do not. The result
    does not depend on the Python version. Raises ModuleNotFoundError if no trainer is installed, UnparsableCode if a
    Python file has a syntax error.
    """
    folder = package if package is not None else trainer_folder()
    digest = hashlib.sha256()
    for name, path in sorted(_code_files(folder)):
        content = _content(path)
        # The lengths mark where a file ends: moving text from one file to the next changes the identity.
        digest.update(f"{len(name.encode())}:{name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def trainer_folder() -> Path:
    """Return the folder of the installed trainer package without importing it (which would import torch)."""
    spec = find_spec(TRAINER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package `{TRAINER_PACKAGE}` is not installed, so the code that makes artifacts cannot be identified; "
            "install `stagecoach[trainer]`",
            name=TRAINER_PACKAGE,
        )
    return Path(spec.submodule_search_locations[0])


def _code_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name with forward slashes, path) of every file that counts."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        counts = path.suffix == ".py" or path.suffix in DATA_SUFFIXES or name == LOCK_FILE
        if counts and "__pycache__" not in path.parts and path.is_file():
            yield name, path


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix in DATA_SUFFIXES:
        return content
    if path.suffix != ".py":
        return lock_content(content.decode())
    try:
        return python_content(content)
    except (SyntaxError, ValueError) as error:  # ValueError: Python before 3.12 on a null byte
        raise UnparsableCode(
            f"{path}: the trainer's code cannot be identified, because this file cannot be parsed ({error}); correct "
            "it, or install `stagecoach[trainer]` again"
        ) from error


# -- Python files ------------------------------------------------------------------------------------------------------


def python_content(source: bytes) -> bytes:
    """Return the syntax tree of a Python file as text that is the same for every supported Python version.

    Left out: everything the parser drops (comments, blank lines, formatting, how a string is quoted or split), and
    statements without an effect, which are docstrings, other bare constants and `pass`. Type annotations count.
    Raises SyntaxError.
    """
    parts: list[str] = []
    _write_node(ast.parse(source), parts)
    return "".join(parts).encode()


def _write_node(node: ast.AST, parts: list[str]) -> None:
    """Append `Class(field=value,…)`. `ast.dump` is not used: which empty fields it prints depends on the version.

    A field that is None or empty is left out, so a field that a later Python adds (3.12: `type_params`) changes
    nothing until it is used.
    """
    parts.append(f"{type(node).__name__}(")
    if isinstance(node, ast.Constant):
        parts.append(ascii(node.value))  # not `repr`: what that escapes depends on the version's Unicode tables
    elif isinstance(node, ast.JoinedStr):
        # Python 3.12 ends some f-strings' values with an empty constant, 3.11 and 3.13 do not.
        _write_value([item for item in node.values if not _is_empty_text(item)], parts)
    else:
        for field in node._fields:
            value = _effective(getattr(node, field, None))
            if value is not None and value != [] and field not in _SKIPPED_FIELDS:
                parts.append(f"{field}=")
                _write_value(value, parts)
                parts.append(",")
    parts.append(")")


def _write_value(value: object, parts: list[str]) -> None:
    if isinstance(value, ast.AST):
        _write_node(value, parts)
    elif isinstance(value, list):
        parts.append("[")
        for item in value:
            _write_value(item, parts)
            parts.append(",")
        parts.append("]")
    else:
        parts.append(ascii(value))


def _effective(value: object) -> object:
    """Return a field's value; of a list of statements, those that have an effect."""
    return [item for item in value if not _has_no_effect(item)] if isinstance(value, list) else value


def _has_no_effect(statement: object) -> bool:
    is_bare_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_bare_constant or isinstance(statement, ast.Pass)


def _is_empty_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value == ""


# -- the lock ----------------------------------------------------------------------------------------------------------


def lock_content(lock: str) -> bytes:
    """Return the pins of a lock, one a line, sorted: name, version, environment marker, and options such as an index.

    Comments, blank lines, spacing and order do not count. Neither do hashes: the files of a release never change, and
    a lock gains hashes when files for further platforms are published.
    """
    lines = re.sub(r"\\\r?\n", " ", lock).splitlines()
    uncommented = (re.sub(r"(^|\s)#.*", "", line) for line in lines)
    pins = (" ".join(re.sub(r"--hash=\S+", "", line).split()) for line in uncommented)
    return "\n".join(sorted(pin for pin in pins if pin)).encode()
