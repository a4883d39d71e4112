"""Answers of an update that was stopped while they were generated, saved next to the checkpoints for the next attempt.

    pool/update-00000007-rollbacks-0-rank-00000-of-00002.safetensors   the experiences of one rank, in their order
                                                        .json          written last: sha256, prompts done, sums

Only an attempt that reaches the same update with the same weights, random numbers and number of ranks can use them,
which the name identifies.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import StoredObject, canonical_json, checkpoints_prefix
from stagecoach_api.store import Corrupt, NotFound, Replaced
from stagecoach_api.stores.base import sha256_of_file
from stagecoach_trainer.ppo.experience import Experience, StoredChunk, write_chunk
from stagecoach_trainer.runtime.attempt_files import replace_file
from stagecoach_trainer.runtime.checkpoint_paths import checkpoints_folder
from stagecoach_trainer.runtime.context import StageContext, World

log = logging.getLogger(__name__)

FOLDER = "pool"


@dataclass(frozen=True)
class SavedRollout:
    """The answers that one rank had made when it was stopped."""

    experiences: StoredChunk
    done: int
    """Number of prompts done of the largest share of any rank. A rank with a smaller share may have one answer less."""
    sums: Mapping[str, Any]
    """The fields of the rank's tally."""


def name_of(update: int, rollbacks: int, world: World) -> str:
    """Return the name of a rank's answers in an update."""
    return f"update-{update:08d}-rollbacks-{rollbacks}-rank-{world.rank:05d}-of-{world.size:05d}"


class SavedRollouts:
    """The saved answers of stopped attempts of one stage."""

    def __init__(self, context: StageContext) -> None:
        digest = context.resolved.digest
        self._store = context.store
        self._prefix = f"{checkpoints_prefix(digest)}/{FOLDER}"
        self._home = checkpoints_folder(context.store, context.cache, digest) / FOLDER
        self._is_in_store = context.store.local_path(self._prefix) is not None
        self._loaded: str | None = None

    def save(self, name: str, experiences: Sequence[Experience], done: int, sums: Mapping[str, Any]) -> None:
        """Write experiences to the local disk and to the store. Raises OSError and StoreError."""
        if not experiences:
            return
        self._home.mkdir(parents=True, exist_ok=True)
        path, about_path = self._paths(name)
        about_path.unlink(missing_ok=True)  # it describes the file that is about to be replaced
        write_chunk(path, experiences)
        found = StoredObject(path=path.name, size=path.stat().st_size, sha256=sha256_of_file(path))
        about = canonical_json({"object": found.model_dump(mode="json"), "done": done, "sums": dict(sums)})
        replace_file(about_path, about)
        # The same order in the store: the .json completes the pair.
        if not self._is_in_store:
            self._store.upload(path, f"{self._prefix}/{path.name}")
            self._store.write(f"{self._prefix}/{about_path.name}", about)

    def load(self, name: str) -> SavedRollout | None:
        """Return the answers saved under a name, downloaded if needed; None if there are none or they are damaged.

        Raises StoreError and OSError if they cannot be read: made again, they would replace what may be intact.
        """
        path, about_path = self._paths(name)
        try:
            if not about_path.is_file():
                self._download(name)
            about = json.loads(about_path.read_bytes())
            _check(path, StoredObject.model_validate(about["object"]))
        except (NotFound, FileNotFoundError):
            return None
        except Replaced:
            raise
        except (Corrupt, ValueError, KeyError) as error:
            log.warning("the answers saved in %s cannot be used (%s); they are made again", path.name, error)
            return None
        self._loaded = name
        return SavedRollout(StoredChunk(path), int(about["done"]), about["sums"])

    def discard_loaded(self) -> None:
        """Delete the answers that were loaded last."""
        if self._loaded is None:
            return
        # The .json first: without it the other file does not count.
        for path in reversed(self._paths(self._loaded)):
            if not self._is_in_store:
                self._store.delete(f"{self._prefix}/{path.name}")
            path.unlink(missing_ok=True)
        self._loaded = None

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self._home / f"{name}.safetensors", self._home / f"{name}.json"

    def _download(self, name: str) -> None:
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
        raise ValueError("size or SHA-256 differs from what was written")
