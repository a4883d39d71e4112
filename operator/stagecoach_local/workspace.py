"""The folder `.stagecoach/`: where a laptop keeps artifacts, attempts, records of runs, and caches.

store/                                          default storage
cache/                                          fetched inputs, tokenised shards, file hashes
runs/<namespace>/<run>/state.json               the run's record: attempts, and what `stagecoach status` shows
runs/<namespace>/<run>/driver.lock              held by the one driver that works on the run
runs/<namespace>/<run>/<stage>/attempt-0001/    stage.json, progress.jsonl, log.txt, result.json, output/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import Field, ValidationError

from stagecoach_api.artifacts import canonical_json
from stagecoach_api.base import Model
from stagecoach_api.names import DEFAULT_LOCAL_ROOT, LOG_FILE, PROGRESS_FILE, RESULT_FILE, STAGE_FILE
from stagecoach_api.outcomes import Cause
from stagecoach_core.values import RunState, StageState

STATE_FILE = "state.json"
LOCK_FILE = "driver.lock"
"""Names with a dot: no stage can be called so."""

KEPT_FOLDERS = ("logs", "outcomes")
"""Folders of an attempt that outlive it: its metrics, and the last words of its workers."""


class WorkspaceError(Exception):
    """The workspace cannot be used; the message says which file and what to do."""


class UnknownRun(WorkspaceError):
    """There is no such run."""


class RunLocked(WorkspaceError):
    """Another driver works on this run."""


class AttemptRecord(Model):
    """One attempt, as it is remembered between two invocations."""

    stage: str
    digest: str
    number: int
    ranks: int = 1
    pid: int
    process_created: float
    """Start time of the process, which tells it from a later one with the same id."""
    started: float
    stopping: str = ""
    """Why the driver asked it to stop. Empty: it did not."""
    stopping_since: float | None = None
    stop_cause: Cause | None = None
    """What its end is charged to if it ends without a result. None: it was not asked to stop."""
    ended: float | None = None
    cause: Cause | None = None
    message: str = ""
    content_digest: str | None = None
    """Content digest of what it published. None: nothing."""
    last_step: int | None = None


class StageRecord(Model):
    """A stage as it was last seen."""

    kind: str
    state: StageState
    digest: str | None = None
    content_digest: str | None = None
    uri: str | None = None
    attempt: int = 0
    ranks: int = 1
    seconds: float | None = None
    """How long the finished work took. None: it is not finished."""
    restarts: dict[Cause, int] = Field(default_factory=dict)
    waiting_for: str = ""
    message: str = ""


class Invocation(Model):
    """How the work on a run was asked for, beside its file: what `stagecoach resume` says again."""

    overrides: tuple[str, ...] = ()
    storage: str | None = None
    until: str | None = None
    nproc: int | None = None


class RunRecord(Model):
    """What is remembered of a run: `state.json`."""

    namespace: str
    run: str
    file: str
    """The TrainingRun's file, absolute."""
    storage_uri: str
    storage_endpoint: str | None = None
    storage_region: str | None = None
    invocation: Invocation = Invocation()
    state: RunState = RunState.PROGRESSING
    message: str = ""
    updated: float
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    attempts: tuple[AttemptRecord, ...] = ()


@dataclass(frozen=True)
class AttemptFolder:
    """The files of one attempt."""

    path: Path

    @property
    def stage_file(self) -> Path:
        return self.path / STAGE_FILE

    @property
    def log(self) -> Path:
        return self.path / LOG_FILE

    @property
    def progress(self) -> Path:
        return self.path / PROGRESS_FILE

    @property
    def result(self) -> Path:
        return self.path / RESULT_FILE

    def drop_scratch(self) -> None:
        """Delete what the ended attempt worked with; its words stay. What it made lies in the store, and half-made
        things would only fill the disk."""
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if path.is_dir() and path.name not in KEPT_FOLDERS:
                    shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def name(self) -> str:
        """`NAMESPACE/RUN`."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def state_file(self) -> Path:
        return self.path / STATE_FILE

    @property
    def lock_file(self) -> Path:
        return self.path / LOCK_FILE

    def attempt(self, stage: str, number: int) -> AttemptFolder:
        return AttemptFolder(self.path / stage / f"attempt-{number:04d}")

    def load(self) -> RunRecord | None:
        """Return the run's record, None where there is none. Raises WorkspaceError for one that cannot be read."""
        try:
            return RunRecord.model_validate_json(self.state_file.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise WorkspaceError(
                f"{self.state_file}: not a record this version can read ({error.error_count()} problems, first: "
                f"{error.errors()[0]['msg']}); move the file away to start without history"
            ) from error

    def save(self, record: RunRecord) -> None:
        write_atomically(self.state_file, record.model_dump_json(indent=1).encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunLocked, naming the holder, where another one works on it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("a+", encoding="utf-8") as file:
            _take(file, self.lock_file)
            try:
                yield
            finally:
                file.truncate(0)

    @property
    def driver(self) -> int | None:
        """Process id of the driver that works on the run now. None: none does, or it has only just begun."""
        if not self.is_locked:
            return None
        try:
            return int(json.loads(self.lock_file.read_text(encoding="utf-8"))["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def is_locked(self) -> bool:
        """Whether a driver works on the run now."""
        try:
            with self.lock_file.open("a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False


def _take(file: IO[str], path: Path) -> None:
    """Lock `file` and write down who holds it. The kernel releases the lock with the process, however it ends."""
    try:
        _lock_soon(file)
    except BlockingIOError as error:
        file.seek(0)
        holder = _holder(file.read())
        raise RunLocked(f"this run is being worked on by {holder} ({path}); wait for it, or stop it") from error
    file.truncate(0)
    json.dump({"pid": os.getpid(), "since": time.time()}, file)
    file.flush()


def _lock_soon(file: IO[str], tries: int = 5, pause_seconds: float = 0.05) -> None:
    """Take the lock. It is tried a few times, since `stagecoach status` holds it for an instant."""
    for _ in range(tries - 1):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(pause_seconds)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(text: str) -> str:
    try:
        told = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["since"]))
        return f"process {told['pid']} since {since}"
    except (ValueError, KeyError, TypeError):
        return "another process"


@dataclass(frozen=True)
class Workspace:
    """The folder itself."""

    root: Path

    @property
    def default_storage(self) -> Path:
        return self.root / "store"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def checkpoints(self, digest: str) -> Path:
        """Return where the trainer keeps the checkpoints of a stage whose storage is remote."""
        return self.cache / "checkpoints" / digest

    def run(self, namespace: str, name: str) -> RunFolder:
        return RunFolder(self.runs / namespace / name)

    def known_runs(self) -> list[RunFolder]:
        """Return every run that has a record, by namespace and name."""
        return [RunFolder(path.parent) for path in sorted(self.runs.glob(f"*/*/{STATE_FILE}"))]

    def find(self, name: str) -> RunFolder:
        """Return the run called `RUN` or `NAMESPACE/RUN`.

        Raises UnknownRun, naming the known ones, for none, and WorkspaceError for several.
        """
        known = self.known_runs()
        found = [run for run in known if name in (run.path.name, f"{run.path.parent.name}/{run.path.name}")]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(run.name for run in found)
            raise WorkspaceError(f"run `{name}` is in several namespaces; give one of {names}")
        raise UnknownRun(self.unknown(name))

    def unknown(self, name: str) -> str:
        """Return what there is to say of a run that is not here."""
        names = ", ".join(run.name for run in self.known_runs()) or "none"
        return f"no run `{name}` in {self.runs}; known runs: {names}"

    def prepare(self) -> None:
        """Make the folder, and keep git out of it. Raises OSError where it cannot be written."""
        self.cache.mkdir(parents=True, exist_ok=True)
        ignore = self.root / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n", encoding="utf-8")


def here() -> Workspace:
    """Return the workspace below the working directory."""
    return Workspace(Path.cwd() / DEFAULT_LOCAL_ROOT)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part. Raises OSError naming the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # of a full disk nobody says where it is
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write canonical JSON atomically."""
    write_atomically(path, canonical_json(value) + b"\n")
