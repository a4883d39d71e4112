"""Answers of an update that was stopped while they were made: kept beside the checkpoints, so that none is made twice.

    pool/update-00000007-rollbacks-0-rank-00000-of-00002.safetensors   the experiences of one rank, in their order
                                                        .json          last: its sha256, how far it came, sums

They are worth something only to an attempt that comes to the same update with the same weights, the same random numbers
and as many ranks; the name says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import StoredObject, canonical_json, checkpoints_prefix
from stagecoach_api.store import NotFound, StoreError
from stagecoach_api.stores.base import sha256_of_file
from stagecoach_trainer.ppo.experience import Experience, StoredChunk, write_chunk
from stagecoach_trainer.runtime.attempt_files import replace_file
from stagecoach_trainer.runtime.checkpoint_paths import checkpoints_folder
from stagecoach_trainer.runtime.context import StageContext, World

log = logging.getLogger(__name__)

FOLDER = "pool"


@dataclass(frozen=True)
class Kept:
    """What one rank had made when it was stopped."""

    experiences: StoredChunk
    done: int
    """Places of its share that it had answered; on a rank with an answer less than others, theirs."""
    sums: Mapping[str, Any]
    """The fields of the rank's tally."""


def name_of(update: int, rollbacks: int, world: World) -> str:
    """Name what a rank makes in an update."""
    return f"update-{update:08d}-rollbacks-{rollbacks}-rank-{world.rank:05d}-of-{world.size:05d}"


class KeptAnswers:
    """The answers that stopped attempts of one stage have left."""

    def __init__(self, context: StageContext) -> None:
        digest = context.resolved.digest
        self._store = context.store
        self._prefix = f"{checkpoints_prefix(digest)}/{FOLDER}"
        self._home = checkpoints_folder(context.store, context.cache, digest) / FOLDER
        self._is_in_store = context.store.local_path(self._prefix) is not None
        self._taken: str | None = None

    def keep(self, name: str, experiences: Sequence[Experience], done: int, sums: Mapping[str, Any]) -> None:
        """Write experiences, here and to the store. Raises OSError and StoreError."""
        if not experiences:
            return
        self._home.mkdir(parents=True, exist_ok=True)
        path, about_path = self._paths(name)
        about_path.unlink(missing_ok=True)  # it would speak of a file that is being replaced
        write_chunk(path, experiences)
        found = StoredObject(path=path.name, size=path.stat().st_size, sha256=sha256_of_file(path))
        about = canonical_json({"object": found.model_dump(mode="json"), "done": done, "sums": dict(sums)})
        replace_file(about_path, about)
        if not self._is_in_store:
            self._store.upload(path, f"{self._prefix}/{path.name}")
            self._store.write(f"{self._prefix}/{about_path.name}", about)

    def find(self, name: str) -> Kept | None:
        """Return what was kept under a name, brought to this machine if need be; None where nothing usable was."""
        path, about_path = self._paths(name)
        try:
            if not about_path.is_file():
                self._bring(name)
            about = json.loads(about_path.read_bytes())
            _check(path, StoredObject.model_validate(about["object"]))
        except (NotFound, FileNotFoundError):
            return None
        except (StoreError, OSError, ValueError, KeyError) as error:
            log.warning("answers kept in %s cannot be used (%s); they are made again", path.name, error)
            return None
        self._taken = name
        return Kept(StoredChunk(path), int(about["done"]), about["sums"])

    def forget(self) -> None:
        """Delete what was found last."""
        if self._taken is None:
            return
        for path in reversed(self._paths(self._taken)):
            if not self._is_in_store:
                self._store.delete(f"{self._prefix}/{path.name}")
            path.unlink(missing_ok=True)
        self._taken = None

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self._home / f"{name}.safetensors", self._home / f"{name}.json"

    def _bring(self, name: str) -> None:
        if self._is_in_store:
            return
        path, about_path = self._paths(name)
        about = self._store.read(f"{self._prefix}/{about_path.name}")
        expected = StoredObject.model_validate(json.loads(about)["object"])
        self._home.mkdir(parents=True, exist_ok=True)
        self._store.download(f"{self._prefix}/{path.name}", path, expected)
        replace_file(about_path, about)


def _check(path: Path, expected: StoredObject) -> None:
    if path.stat().st_size != expected.size or sha256_of_file(path) != expected.sha256:
        raise ValueError("the bytes are not the ones that were written")
