"""Which code makes artifacts: a hash of the trainer package, the same for a checkout and for an installed wheel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TRAINER_PACKAGE = "stagecoach_trainer"
LOCK_FILE = "requirements.lock"


def code_identity(package: Path | None = None) -> str:
    """Return the SHA-256 (hex) over names and bytes of the trainer's Python files and its lock file.

    `package` is the package's folder; None: the installed one, found without importing it. Bytecode, data files and
    where the package lies do not count. Raises ModuleNotFoundError where no trainer is installed.
    """
    folder = package if package is not None else trainer_folder()
    digest = hashlib.sha256()
    for name, path in sorted(_code_files(folder)):
        content = path.read_bytes()
        # Lengths keep the end of one file and the beginning of the next apart.
        digest.update(f"{len(name.encode())}:{name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def trainer_folder() -> Path:
    """Return the folder of the installed trainer package without importing it (which would import torch)."""
    spec = find_spec(TRAINER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package `{TRAINER_PACKAGE}` is not installed, so artifacts cannot be told apart by the code that made "
            "them; install `stagecoach[trainer]`",
            name=TRAINER_PACKAGE,
        )
    return Path(spec.submodule_search_locations[0])


def _code_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name with forward slashes, path)."""
    for path in folder.rglob("*.py"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix(), path
    lock = folder / LOCK_FILE
    if lock.is_file():
        yield LOCK_FILE, lock
