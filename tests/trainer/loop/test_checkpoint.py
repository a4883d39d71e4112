"""Whenever a save is killed, a complete checkpoint is left: the previous one or the new one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stagecoach_api.store import FolderStore
from stagecoach_api.stores.base import FolderLocation
from stagecoach_api.training import Checkpoints
from stagecoach_trainer.engine.engine import MASTER, EngineState
from stagecoach_trainer.loop import checkpoint
from stagecoach_trainer.loop.checkpoint import CheckpointManager, not_superseded, read_checkpoint
from stagecoach_trainer.loop.state import Progression, TrainingState
from stagecoach_trainer.runtime.checkpoint_paths import CheckpointId
from stagecoach_trainer.runtime.context import StageContext
from tests.trainer.loop.makers import context


class Killed(BaseException):
    """The process has died: nothing that it would have done later happens."""


class Remote(FolderStore):
    """A folder that behaves like S3, nothing in it can be read in place; its writer can be killed."""

    left: int | None = None
    """Changes until the kill."""

    def local_path(self, key: str) -> Path | None:
        return None

    def _count(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def upload(self, *values: Any, **more: Any) -> Any:
        self._count()
        return super().upload(*values, **more)

    def write(self, *values: Any, **more: Any) -> Any:
        self._count()
        return super().write(*values, **more)

    def delete(self, *values: Any, **more: Any) -> Any:
        self._count()
        return super().delete(*values, **more)


def state(step: int, value: float) -> TrainingState:
    tensors = {f"{MASTER}weight": torch.full((4,), value)}
    return TrainingState(Progression(step=step), EngineState(tensors, step, 1.0, 0), ({"torch": torch.zeros(2)},))


def remote(tmp_path: Path, machine: str) -> StageContext:
    return replace(context(tmp_path / machine), store=Remote(FolderLocation(tmp_path / "bucket")))


def book_of(here: StageContext, **settings: Any) -> CheckpointManager:
    return CheckpointManager(here, Checkpoints.model_validate({"everySteps": 1, "keepLast": 1} | settings), 10)


def save(book: CheckpointManager, *states: TrainingState) -> None:
    for item in states:
        book.save(item)
        book.wait()


def found(here: StageContext) -> tuple[int, float] | None:
    """The step and the value from which a new attempt would resume."""
    book = book_of(here)
    mark = book.find_newest()
    if mark is None:
        return None
    read = read_checkpoint(book.fetch(mark), 0)
    return read.step, float(read.engine.tensors[f"{MASTER}weight"][0])


def test_a_save_of_the_same_step_killed_at_any_file_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint._described
    for files in range(5):
        here = context(tmp_path / str(files))
        book = book_of(here)
        save(book, state(4, 1.0))
        written: list[Path] = []

        def die(path: Path, written: list[Path] = written, most: int = files) -> Any:
            written.append(path)
            if len(written) > most:
                raise Killed
            return write(path)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_described", die)
            with pytest.raises(Killed):
                save(book, state(4, 2.0))
        assert found(here) == (4, 1.0)
    save(book_again(here), state(4, 3.0))
    assert found(here) == (4, 3.0)


def book_again(here: StageContext) -> CheckpointManager:
    book = book_of(here)
    book.find_newest()
    return book


def test_an_upload_of_the_same_step_killed_at_any_object_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    seen = []
    for changes in range(8):
        folder = tmp_path / str(changes)
        here = remote(folder, "first")
        book = book_of(here)
        save(book, state(4, 1.0))
        store: Any = here.store
        store.left = changes
        with contextlib.suppress(Killed):
            save(book, state(4, 2.0))
        seen.append(found(remote(folder, "second")))
    assert seen == [(4, 1.0)] * 6 + [(4, 2.0)] * 2  # five files and the manifest; then the old one is deleted


def test_after_a_rollback_the_new_branch_is_newer_than_superseded_steps(tmp_path: Path) -> None:
    here = context(tmp_path)
    book = book_of(here, keepLast=10)
    save(book, state(2, 1.0), state(3, 1.0), state(4, 1.0))
    save(book, state(2, 2.0))
    assert found(here) == (2, 2.0)
    save(book, state(3, 2.0))
    home = here.store.local_path(f"artifacts/{here.resolved.digest}/checkpoints")
    assert home is not None
    assert sorted(path.name for path in home.iterdir()) == ["step-00000002-0001", "step-00000003-0001"]


def test_killed_while_superseded_steps_are_deleted_it_resumes_from_the_new_branch(tmp_path: Path) -> None:
    here = remote(tmp_path, "first")
    book = book_of(here, keepLast=10)
    save(book, state(2, 1.0), state(3, 1.0), state(4, 1.0))
    store: Any = here.store
    store.left = 7  # five files, the manifest, and one of the three to be deleted
    with pytest.raises(Killed):
        save(book, state(2, 2.0))
    assert found(remote(tmp_path, "second")) == (2, 2.0)
    assert found(here) == (2, 2.0)  # its own copies do not mislead it


def test_an_id_and_its_name_convert_to_each_other() -> None:
    for mark in (CheckpointId(0, 12), CheckpointId(3, 12)):
        assert CheckpointId.of(mark.name) == mark
    assert CheckpointId.of("step-1") is CheckpointId.of("pool") is None


def test_steps_at_or_after_a_rollback_are_superseded() -> None:
    saved = [CheckpointId(version, step) for version, step in ((0, 1), (0, 5), (0, 6), (1, 5), (1, 7), (2, 6))]
    assert not_superseded(saved) == [CheckpointId(0, 1), CheckpointId(1, 5), CheckpointId(2, 6)]
