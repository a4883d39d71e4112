"""Where a stage's checkpoints lie on this machine. Knows no torch, so that the entry point may look too."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from stagecoach_api.artifacts import MANIFEST, checkpoint_name, checkpoints_prefix
from stagecoach_api.store import Store

CHECKPOINT_NAME = re.compile(r"step-(\d{8})")


def checkpoints_home(store: Store, cache: Path, digest: str) -> Path:
    """Return the folder in which the checkpoints of a stage are written: the store itself where it is a folder."""
    return store.local_path(checkpoints_prefix(digest)) or cached_checkpoints(cache, digest)


def cached_checkpoints(cache: Path, digest: str) -> Path:
    return cache / "checkpoints" / digest


def complete_steps(home: Path) -> list[int]:
    """Return the steps whose checkpoint has a manifest, in ascending order."""
    if not home.is_dir():
        return []
    found = (CHECKPOINT_NAME.fullmatch(path.name) for path in home.iterdir() if (path / MANIFEST).is_file())
    return sorted(int(match[1]) for match in found if match)


def checkpoint_folder(home: Path, step: int) -> Path:
    return home / checkpoint_name(step)


def delete_checkpoints(store: Store, cache: Path, digest: str) -> None:
    """Delete the checkpoints of a stage whose artifact is published."""
    store.delete(checkpoints_prefix(digest))
    shutil.rmtree(cached_checkpoints(cache, digest), ignore_errors=True)
