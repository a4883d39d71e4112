"""Names and local folders of a stage's checkpoints. Does not import torch, so that the entry point can use it."""

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
    """Identifies a checkpoint of a stage; the greater of two ids is the newer checkpoint.

    Saving again at or before the newest step, as after a rollback, raises the version, which later checkpoints keep. So
    no checkpoint is ever overwritten.
    """

    version: int
    step: int

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return checkpoint_name(self.step, self.version)

    @classmethod
    def of(cls, name: str) -> CheckpointId | None:
        """Return the id that a folder's name encodes; None if it is not a checkpoint's name."""
        found = CHECKPOINT_NAME.fullmatch(name)
        return None if found is None else cls(int(found[2] or 0), int(found[1]))


def checkpoints_folder(store: Store, cache: Path, digest: str) -> Path:
    """Return the local folder of a stage's checkpoints: in the store if that is a folder, else in the cache."""
    return store.local_path(checkpoints_prefix(digest)) or cached_checkpoints_folder(cache, digest)


def cached_checkpoints_folder(cache: Path, digest: str) -> Path:
    return cache / "checkpoints" / digest


def complete_checkpoints(home: Path) -> list[CheckpointId]:
    """Return the checkpoints in `home` that have a manifest, the oldest first."""
    if not home.is_dir():
        return []
    found = (CheckpointId.of(path.name) for path in home.iterdir() if (path / MANIFEST).is_file())
    return sorted(checkpoint for checkpoint in found if checkpoint is not None)


def delete_checkpoints(store: Store, cache: Path, digest: str) -> None:
    """Delete all checkpoints of a stage, after its artifact is published."""
    store.delete(checkpoints_prefix(digest))
    shutil.rmtree(cached_checkpoints_folder(cache, digest), ignore_errors=True)
