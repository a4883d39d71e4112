"""Checkpoints: the training state as safetensors and JSON files, complete once their manifest exists.

    step-00001200/{master,exp_avg,exp_avg_sq}.safetensors   fp32, by parameter name; frozen parameters are not stored
                  rng-00000.safetensors …                   random-number state of each rank
                  state.json                                counters, data cursor, measurements, loss scale
                  manifest.json                             written last: names, sizes and sha256 of the others

A background thread writes, reads back and uploads them. Nothing is ever pickled, and no checkpoint is overwritten: a
second one of the same step is another version, `step-00001200-0001` (`CheckpointId`), and deletes what it supersedes
once it is complete. Nothing else deletes a checkpoint. One whose bytes were read and are wrong is passed over, and
superseded later; one that cannot be read (access denied, no answer, unknown format) ends the attempt and stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stagecoach_api.artifacts import MANIFEST, StoredObject, canonical_json, checkpoints_prefix
from stagecoach_api.outcomes import ExitCode
from stagecoach_api.store import Corrupt, NotFound, Replaced, StoreError
from stagecoach_api.stores.base import sha256_of_file
from stagecoach_api.training import Checkpoints
from stagecoach_trainer.engine.engine import MASTER, MOMENT_1, MOMENT_2, EngineState
from stagecoach_trainer.loop.state import Progression, TrainingState
from stagecoach_trainer.runtime.attempt_files import replace_file
from stagecoach_trainer.runtime.checkpoint_paths import CheckpointId, checkpoints_folder, complete_checkpoints
from stagecoach_trainer.runtime.collectives import agree
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.runtime.errors import StageError, UserError

log = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"
PREFIXES = (MASTER, MOMENT_1, MOMENT_2)
DEFAULT_CHECKPOINTS = 10
"""Checkpoints per stage if `everySteps` is unset."""


class BrokenCheckpoint(StageError):
    """Bytes of a checkpoint were read, and are wrong; the message names the file and what is wrong with it."""

    exit_code = ExitCode.STORAGE


class IncompleteCheckpoint(BrokenCheckpoint):
    """A file that a checkpoint's manifest names does not exist."""


# -- one checkpoint ----------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, state: TrainingState) -> None:
    """Write a checkpoint, read every byte back, and only then write its manifest, which makes it complete.

    Raises OSError (a full disk), and BrokenCheckpoint if a tensor read back differs from the one written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        objects = list(_write_files(folder, state))
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "ranks": len(state.random_states),
            "objects": [item.model_dump(mode="json") for item in objects],
        }
        replace_file(folder / MANIFEST, canonical_json(manifest))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint is useless, and a full disk needs the space
        raise


def _write_files(folder: Path, state: TrainingState) -> Iterator[StoredObject]:
    for prefix in PREFIXES:
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.engine.tensors.items()
            if name.startswith(prefix)
        }
        yield _write_tensors(folder / f"{prefix.rstrip('/')}.safetensors", tensors)
    for rank, random_state in enumerate(state.random_states):
        yield _write_tensors(folder / f"rng-{rank:05d}.safetensors", random_state)
    about = {
        "progression": state.progression.to_json(),
        "numSteps": state.engine.num_steps,
        "lossScale": state.engine.loss_scale,
        "goodSteps": state.engine.good_steps,
    }
    path = folder / STATE_FILE
    path.write_bytes(canonical_json(about))
    yield _described(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> StoredObject:
    """Write contiguous CPU tensors to the disk and compare what is read back with what is in memory."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise _system_error(error, path) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())  # safetensors does not: without it a power cut can leave a complete, empty checkpoint
    with safe_open(path, framework="pt") as written:
        for name, tensor in tensors.items():
            if not torch.equal(_bytes_of(written.get_tensor(name)), _bytes_of(tensor)):
                raise BrokenCheckpoint(f"{path}: `{name}` read back from the disk differs from what was written")
    return _described(path)


def _system_error(error: SafetensorError, path: Path) -> Exception:
    """Return the OSError that a safetensors error reports as text only, such as a full disk."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return error if found is None else OSError(int(found[1]), os.strerror(int(found[1])), str(path))


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, which compare equal even where the numbers are NaN."""
    return tensor.reshape(-1).view(torch.uint8)


def _described(path: Path) -> StoredObject:
    return StoredObject(path=path.name, size=path.stat().st_size, sha256=sha256_of_file(path))


def read_checkpoint(folder: Path, rank: int) -> TrainingState:
    """Read a checkpoint after checking its bytes; of the random states, only this rank's is read, if it exists.

    Tensors are read from the disk when they are used. Raises BrokenCheckpoint; UserError for the format of another
    version; OSError for a file that cannot be read.
    """
    check_checkpoint(folder)
    own_states = folder / f"rng-{rank:05d}.safetensors"
    try:
        about = json.loads((folder / STATE_FILE).read_bytes())
        tensors: dict[str, Tensor] = {}
        for prefix in PREFIXES:
            found = _read_tensors(folder / f"{prefix.rstrip('/')}.safetensors")
            tensors |= {prefix + name: tensor for name, tensor in found.items()}
        return TrainingState(
            progression=Progression.from_json(about["progression"]),
            engine=EngineState(tensors, about["numSteps"], about["lossScale"], about["goodSteps"]),
            random_states=(_read_tensors(own_states),) if own_states.is_file() else (),
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:  # its bytes are those that were written
        raise UserError(f"{folder}: {_OTHER_VERSION} ({type(error).__name__}: {error})") from error


def check_checkpoint(folder: Path) -> None:
    """Compare every byte with the manifest. Raises what `read_manifest` raises."""
    for item in read_manifest(folder):
        _check(folder, item)


def read_manifest(folder: Path) -> tuple[StoredObject, ...]:
    """Return the files of a complete checkpoint, except the manifest.

    Raises BrokenCheckpoint; UserError for the format of another version; OSError if the manifest cannot be read.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise IncompleteCheckpoint(f"{path}: the file is missing") from error


def parse_manifest(data: bytes, place: str) -> tuple[StoredObject, ...]:
    """Return the files that a manifest names. `place`: where it is stored. Raises BrokenCheckpoint and UserError."""
    try:
        about: dict[str, Any] = json.loads(data)
        if about["format"] != FORMAT:
            raise UserError(f"{place}: format {about['format']}, this version reads format {FORMAT}; {_OTHER_VERSION}")
        return tuple(StoredObject.model_validate(item) for item in about["objects"])
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(f"{place}: this is not the manifest of a checkpoint ({error})") from error


_OTHER_VERSION = (
    "the checkpoint was written by another version of the trainer, which can continue it; to begin again with this "
    "version, delete the checkpoint"
)


def _check(folder: Path, item: StoredObject) -> None:
    path = folder / item.path
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise IncompleteCheckpoint(f"{path}: the file is missing") from error
    if size != item.size or sha256_of_file(path) != item.sha256:
        raise BrokenCheckpoint(f"{path}: the content differs from what was saved")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


# -- all checkpoints of a stage ----------------------------------------------------------------------------------------


class CheckpointManager:
    """The checkpoints of one stage on this machine and in the store."""

    def __init__(self, context: StageContext, config: Checkpoints, num_steps: int) -> None:
        self._store = context.store
        self._confirm_writer = context.confirm_writer
        self._prefix = checkpoints_prefix(context.resolved.digest)
        self._home = checkpoints_folder(context.store, context.cache, context.resolved.digest)
        self._is_in_store = context.store.local_path(self._prefix) is not None
        self._downloads = context.world.local_rank == 0
        self._config = config
        self._every = config.every_steps or max(1, -(-num_steps // DEFAULT_CHECKPOINTS))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._last: CheckpointId | None = None
        """The greatest id in use, also that of a checkpoint that cannot be used."""
        self._intact: set[CheckpointId] = set()
        """Checkpoints whose local files this process has compared with their manifest."""
        self.newest: CheckpointId | None = None
        """The newest checkpoint known to be usable."""

    @property
    def newest_step(self) -> int | None:
        """Step of `newest`."""
        return None if self.newest is None else self.newest.step

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps."""
        return step % self._every == 0

    # saving

    def save(self, state: TrainingState, healthy: int | None = None) -> None:
        """Save a state in the background once the previous save is complete; the state must not change any more.

        `healthy`: do not delete the checkpoint that `find_before(healthy)` finds now. Raises the error of the previous
        save.
        """
        self.wait()
        self._pending = self._writer.submit(self._save, state, healthy)

    def wait(self) -> None:
        """Wait until the last save is complete and uploaded. Raises its error."""
        # Cleared before the result is read, so that the error of a failed save is raised only once.
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for a save in progress, ignoring its errors, and stop the thread."""
        self._writer.shutdown(wait=True)

    def _save(self, state: TrainingState, healthy: int | None) -> None:
        checkpoint = self._next(state.step)
        folder = self._home / checkpoint.name
        if self._is_in_store:
            self._confirm_writer()  # the folder is the store's, which other attempts write to
        write_checkpoint(folder, state)
        if not self._is_in_store:
            self._upload(folder)
        self.newest = self._last = checkpoint
        self._intact.add(checkpoint)
        log.info("checkpoint saved: step %d", checkpoint.step)
        # Last: older checkpoints are needed until the new one is complete, in the store too.
        self._delete_old(healthy)

    def _next(self, step: int) -> CheckpointId:
        """Return the id of the next checkpoint, which sorts after all others."""
        if self._last is None:
            return CheckpointId(0, step)
        # After a rollback, or following a broken checkpoint, the step is not above the last one: a higher version keeps
        # the order of ids that of time.
        return CheckpointId(self._last.version + (step <= self._last.step), step)

    def _upload(self, folder: Path) -> None:
        # An attempt on a lost node must not write over the checkpoints of the next one.
        self._confirm_writer()
        # The manifest is uploaded last: until then the checkpoint does not exist for a reader.
        for item in read_manifest(folder):
            self._store.upload(folder / item.path, f"{self._prefix}/{folder.name}/{item.path}")
        self._confirm_writer()
        self._store.write(f"{self._prefix}/{folder.name}/{MANIFEST}", (folder / MANIFEST).read_bytes())

    def _delete_old(self, healthy: int | None) -> None:
        ids = self._complete()
        kept = not_superseded(ids)
        steps = [checkpoint.step for checkpoint in kept]
        old = set(steps_to_delete(steps, self._config.keep_last, self._config.keep_every_steps))
        if healthy is not None:  # keep what `find_before(healthy)` returns
            old.discard(max((step for step in steps if step <= healthy), default=steps[0]))
        for checkpoint in ids:
            if checkpoint not in kept or checkpoint.step in old:
                self._delete(checkpoint)

    def _delete(self, checkpoint: CheckpointId) -> None:
        try:
            self._store.delete(f"{self._prefix}/{checkpoint.name}")
        except StoreError as error:  # it only takes up space: an account without the permission may still train
            log.warning("the superseded checkpoint of step %d stays in the store: %s", checkpoint.step, error)
            return
        folder = self._home / checkpoint.name
        # The manifest first: killed in between, half a checkpoint must not count as complete.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _complete(self) -> list[CheckpointId]:
        """Return the complete checkpoints on this machine and in the store, the oldest first."""
        return sorted({*complete_checkpoints(self._home), *self._list_store()})

    # restoring

    def find_newest(self) -> CheckpointId | None:
        """Return the newest checkpoint whose bytes match its manifest, downloaded if necessary; None if there is none.

        One whose bytes are wrong is logged and passed over. Raises StoreError and OSError if a checkpoint cannot be
        read, UserError for one of another version, and if files are missing of every checkpoint that is not broken:
        training begins at step 0 only if there is nothing to continue.
        """
        ids = self._complete()
        self._last = max(ids, default=None)
        self.newest = self._first_usable(ids[::-1])
        return self.newest

    def find_before(self, step: int) -> CheckpointId | None:
        """Return the newest intact checkpoint of at most `step` steps, or else the oldest one; None without any.

        Raises what `find_newest` raises.
        """
        ids = not_superseded(self._complete())
        before = [item for item in ids if item.step <= step]
        return self._first_usable([*reversed(before), *ids[len(before) :]])

    def fetch(self, checkpoint: CheckpointId) -> Path:
        """Return the local folder of a checkpoint. The first rank of a node downloads what is missing or damaged.

        Raises BrokenCheckpoint, StoreError and OSError.
        """
        if self._downloads and not self._is_in_store and checkpoint not in self._intact:
            self._make_usable(checkpoint)
        return self._home / checkpoint.name

    def _first_usable(self, ids: Iterable[CheckpointId]) -> CheckpointId | None:
        incomplete: list[IncompleteCheckpoint] = []
        for checkpoint in ids:
            try:
                self._make_usable(checkpoint)
            except BrokenCheckpoint as error:
                log.warning("the checkpoint of step %d cannot be used and is passed over: %s", checkpoint.step, error)
                incomplete += [error] if isinstance(error, IncompleteCheckpoint) else []
            else:
                return checkpoint
        if incomplete:
            raise UserError(
                f"no checkpoint of this stage is complete: {incomplete[0]}; restore what is missing, or delete "
                f"{self._store.uri}/{self._prefix} to begin again at step 0"
            )
        return None

    def _make_usable(self, checkpoint: CheckpointId) -> None:
        """Check the local files, and download those that are missing or damaged. Raises what `fetch` raises."""
        folder = self._home / checkpoint.name
        try:
            check_checkpoint(folder)
        except BrokenCheckpoint as error:
            if self._is_in_store:
                raise
            if not isinstance(error, IncompleteCheckpoint):
                log.warning("%s; it is downloaded again", error)
            self._download(folder)
        self._intact.add(checkpoint)

    def _list_store(self) -> list[CheckpointId]:
        if self._is_in_store:
            return []
        ids = []
        for entry in self._store.list(self._prefix):
            name, _, file = entry.key.removeprefix(f"{self._prefix}/").partition("/")
            checkpoint = CheckpointId.of(name)
            if checkpoint is not None and file == MANIFEST:
                ids.append(checkpoint)
        return ids

    def _download(self, folder: Path) -> None:
        """Make a folder equal to the checkpoint in the store; intact files are kept."""
        prefix = f"{self._prefix}/{folder.name}"
        manifest, objects = self._stored_manifest(f"{prefix}/{MANIFEST}")
        folder.mkdir(parents=True, exist_ok=True)
        for item in objects:
            with contextlib.suppress(BrokenCheckpoint):
                _check(folder, item)
                continue
            self._download_file(prefix, item, folder)
        replace_file(folder / MANIFEST, manifest)  # last: an interrupted download is not a checkpoint

    def _stored_manifest(self, key: str) -> tuple[bytes, tuple[StoredObject, ...]]:
        try:
            manifest = self._store.read(key)
            with contextlib.suppress(BrokenCheckpoint):
                return manifest, parse_manifest(manifest, key)
            manifest = self._store.read(key)  # the transfer may have damaged it
            return manifest, parse_manifest(manifest, key)
        except NotFound as error:
            raise BrokenCheckpoint(f"{key}: the store has no copy of this checkpoint") from error
        except Replaced:
            raise
        except Corrupt as error:
            raise BrokenCheckpoint(str(error)) from error

    def _download_file(self, prefix: str, item: StoredObject, folder: Path) -> None:
        try:
            self._store.download(f"{prefix}/{item.path}", folder / item.path, item)
        except NotFound as error:
            if self._store.exists(f"{prefix}/{MANIFEST}"):
                raise IncompleteCheckpoint(str(error)) from error
            raise BrokenCheckpoint(f"{prefix}: another process has just deleted this checkpoint") from error
        except Replaced:
            raise
        except Corrupt as error:
            raise BrokenCheckpoint(str(error)) from error


def agree_on_checkpoint(checkpoint: CheckpointId | None, world: World) -> CheckpointId | None:
    """Return rank 0's checkpoint id on every rank."""
    own = (checkpoint.version, checkpoint.step) if checkpoint else (None, None)
    version, step = (agree(value, world) for value in own)
    return None if version is None or step is None else CheckpointId(version, step)


def not_superseded(ids: list[CheckpointId]) -> list[CheckpointId]:
    """Return the ids (ascending) without those superseded after a rollback, when a newer one has at most their step."""
    kept: list[CheckpointId] = []
    for checkpoint in reversed(ids):
        if not kept or checkpoint.step < kept[-1].step:
            kept.append(checkpoint)
    return kept[::-1]


def steps_to_delete(steps: list[int], keep_last: int, keep_every: int | None) -> list[int]:
    """Return the saved `steps` (ascending) that are neither among the newest nor multiples of `keep_every`."""
    return [step for step in steps[:-keep_last] if keep_every is None or step % keep_every]
