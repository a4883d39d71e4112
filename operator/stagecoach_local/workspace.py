"""The folder `.stagecoach/`: artifacts, attempts, records of runs, and caches of the local driver.

store/                                          default storage
cache/                                          fetched inputs, tokenised shards, file hashes
runs/<namespace>/<run>/state.json               the run's record: attempts, and what `stagecoach status` shows
runs/<namespace>/<run>/driver.lock              held by the driver of the run; there is at most one
runs/<namespace>/<run>/run.uid                  distinguishes the run in a store that others share
runs/<namespace>/<run>/<stage>/attempt-0001/    stage.json, progress.jsonl, log.txt, result.json, output/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
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
UID_FILE = "run.uid"
"""Names with a dot cannot collide with a stage's folder."""

KEPT_FOLDERS = ("logs", "outcomes")
"""Folders that are kept after an attempt: its metrics, and its workers' outcomes."""


class WorkspaceError(Exception):
    """The workspace cannot be used; the message names the file and what to do."""


class UnknownRun(WorkspaceError):
    """There is no such run."""


class RunLocked(WorkspaceError):
    """Another driver holds this run's lock."""


class AttemptRecord(Model):
    """One attempt, as recorded between two invocations."""

    stage: str
    digest: str
    number: int
    ranks: int = 1
    pid: int
    process_created: float
    """Start time of the process; distinguishes it from a later process with the same id."""
    started: float
    stopping: str = ""
    """Why the driver asked it to stop; empty if it did not."""
    stopping_since: float | None = None
    stop_cause: Cause | None = None
    """Cause that is recorded if it ends without a result after a stop request; None if it was not asked to stop."""
    ended: float | None = None
    cause: Cause | None = None
    message: str = ""
    content_digest: str | None = None
    """Content digest of the artifact it published; None if it published none."""
    last_step: int | None = None
    resumed_from: int | None = None
    """Step after which it resumed. None if it started at the first one."""
    fault: str = ""
    """Type and place of an error that may recur; empty if there is none."""


class StageRecord(Model):
    """A stage, as last observed."""

    kind: str
    state: StageState
    digest: str | None = None
    content_digest: str | None = None
    uri: str | None = None
    attempt: int = 0
    ranks: int = 1
    seconds: float | None = None
    """Duration of the finished work; None if it is not finished."""
    restarts: dict[Cause, int] = Field(default_factory=dict)
    waiting_for: str = ""
    message: str = ""


class Invocation(Model):
    """The options of `stagecoach run`, which `stagecoach resume` uses again."""

    overrides: tuple[str, ...] = ()
    storage: str | None = None
    until: str | None = None
    nproc: int | None = None


class RunRecord(Model):
    """The record of a run: `state.json`."""

    namespace: str
    run: str
    file: str
    """Absolute path of the TrainingRun's file."""
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
        """Delete the working files of an ended attempt; logs and metrics are kept.

        Finished output is in the store, and partial output is of no use.
        """
        # Best effort: the attempt has ended, and a leftover folder costs only disk space.
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

    def uid(self) -> str:
        """Return the id of this folder, made with its first use, which no run anywhere else has."""
        file = self.path / UID_FILE
        if not file.exists():  # only the driver that holds the run's lock asks
            write_atomically(file, secrets.token_hex(8).encode())
        return file.read_text(encoding="ascii")

    def attempt(self, stage: str, number: int) -> AttemptFolder:
        return AttemptFolder(self.path / stage / f"attempt-{number:04d}")

    def load(self) -> RunRecord | None:
        """Return the run's record, None if there is none. Raises WorkspaceError if it cannot be parsed."""
        try:
            return RunRecord.model_validate_json(self.state_file.read_bytes())
        except FileNotFoundError:
            return None
        # Not ignored: the record may list live processes, so starting without it is left to the user.
        except ValidationError as error:
            raise WorkspaceError(
                f"{self.state_file}: this version cannot read the record ({error.error_count()} problems, first: "
                f"{error.errors()[0]['msg']}); move the file away to start without history"
            ) from error

    def save(self, record: RunRecord) -> None:
        write_atomically(self.state_file, record.model_dump_json(indent=1).encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's lock. Raises RunLocked with the holder's process id if another driver holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("a+", encoding="utf-8") as file:
            _take(file, self.lock_file)
            try:
                yield
            finally:
                file.truncate(0)  # the file is never deleted: another driver may be waiting for a lock on it

    @property
    def driver(self) -> int | None:
        """Process id of the run's driver; None if there is none, or if it has not written its id yet."""
        # The lock first: a driver that was killed leaves its id in the file, and the id may be reused.
        if not self.is_locked:
            return None
        try:
            return int(json.loads(self.lock_file.read_text(encoding="utf-8"))["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def is_locked(self) -> bool:
        """Whether a driver holds the run's lock."""
        try:
            with self.lock_file.open("a+", encoding="utf-8") as file:  # not "w", which would erase the holder's id
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False  # closing the file releases the lock
        except BlockingIOError:
            return True
        # Without the run's folder the file cannot be opened: the run has never had a driver.
        except OSError:
            return False


def _take(file: IO[str], path: Path) -> None:
    """Lock `file` and write the holder into it. The kernel releases the lock when the process ends for any reason."""
    try:
        _lock_soon(file)
    except BlockingIOError as error:
        file.seek(0)
        holder = _holder(file.read())
        raise RunLocked(f"another driver is working on this run: {holder} ({path}); wait for it, or stop it") from error
    # Opened in append mode: the text is written at the end of the file, wherever its position is.
    file.truncate(0)
    json.dump({"pid": os.getpid(), "since": time.time()}, file)
    file.flush()


def _lock_soon(file: IO[str], tries: int = 5, pause_seconds: float = 0.05) -> None:
    """Take the lock, with a few retries, since `stagecoach status` holds it for an instant."""
    for _ in range(tries - 1):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(pause_seconds)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(text: str) -> str:
    try:
        content = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(content["since"]))
        return f"process {content['pid']} since {since}"
    except (ValueError, KeyError, TypeError):
        return "unknown process"


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
        """Return the folder in which the trainer keeps the checkpoints of a stage whose storage is remote."""
        return self.cache / "checkpoints" / digest

    def run(self, namespace: str, name: str) -> RunFolder:
        return RunFolder(self.runs / namespace / name)

    def known_runs(self) -> list[RunFolder]:
        """Return every run that has a record, sorted by namespace and name."""
        return [RunFolder(path.parent) for path in sorted(self.runs.glob(f"*/*/{STATE_FILE}"))]

    def find(self, name: str) -> RunFolder:
        """Return the run called `RUN` or `NAMESPACE/RUN`.

        Raises UnknownRun, which lists the known runs, if there is none, and WorkspaceError if there are several.
        """
        known = self.known_runs()
        found = [run for run in known if name in (run.path.name, f"{run.path.parent.name}/{run.path.name}")]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(run.name for run in found)
            raise WorkspaceError(f"run `{name}` exists in several namespaces; give one of {names}")
        raise UnknownRun(self.unknown_message(name))

    def unknown_message(self, name: str) -> str:
        """Return the error message for a run that is not in this workspace."""
        names = ", ".join(run.name for run in self.known_runs()) or "none"
        return f"no run `{name}` in {self.runs}; known runs: {names}"

    def prepare(self) -> None:
        """Create the folder with a `.gitignore`. Raises OSError if it cannot be written."""
        self.cache.mkdir(parents=True, exist_ok=True)
        ignore = self.root / ".gitignore"
        # A user's own file stays. Without any, gigabytes of checkpoints could end up in a commit.
        if not ignore.exists():
            ignore.write_text("*\n", encoding="utf-8")


def current_workspace() -> Workspace:
    """Return the workspace in the working directory."""
    return Workspace(Path.cwd() / DEFAULT_LOCAL_ROOT)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see either the old content or the new. Raises OSError with the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within a file system.
    # The process id keeps two commands that write the same file from renaming each other's unfinished one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # the error of a full disk does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write canonical JSON atomically."""
    write_atomically(path, canonical_json(value) + b"\n")
