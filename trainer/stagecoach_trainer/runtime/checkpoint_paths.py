"""Where a stage's checkpoints lie on this machine. Knows no torch, so that the entry point may look too."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.artifacts import MANIFEST, checkpoint_name, checkpoints_prefix
from stagecoach_api.store import Store

CHECKPOINT_NAME = re.compile(r"step-(\d{8})(?:-(\d{4}))?")


@dataclass(frozen=True, order=True)
class CheckpointId:
    """Tells checkpoints apart. The greater of two is the newer: what is saved again at a step saved already, as after
    going back to it, has a version of its own, and so has all that follows. No checkpoint is ever written over."""

    version: int
    step: int

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return checkpoint_name(self.step, self.version)

    @classmethod
    def of(cls, name: str) -> CheckpointId | None:
        """Return the mark of a folder's name. None: it is not a checkpoint's."""
        found = CHECKPOINT_NAME.fullmatch(name)
        return None if found is None else cls(int(found[2] or 0), int(found[1]))


def checkpoints_folder(store: Store, cache: Path, digest: str) -> Path:
    """Return the folder in which the checkpoints of a stage are written: the store itself where it is a folder."""
    return store.local_path(checkpoints_prefix(digest)) or cached_checkpoints_folder(cache, digest)


def cached_checkpoints_folder(cache: Path, digest: str) -> Path:
    return cache / "checkpoints" / digest


def complete_checkpoints(home: Path) -> list[CheckpointId]:
    """Return the checkpoints that have a manifest, the oldest first."""
    if not home.is_dir():
        return []
    found = (CheckpointId.of(path.name) for path in home.iterdir() if (path / MANIFEST).is_file())
    return sorted(mark for mark in found if mark is not None)


def delete_checkpoints(store: Store, cache: Path, digest: str) -> None:
    """Delete the checkpoints of a stage whose artifact is published."""
    store.delete(checkpoints_prefix(digest))
    shutil.rmtree(cached_checkpoints_folder(cache, digest), ignore_errors=True)
