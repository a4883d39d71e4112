"""The local driver: stages as processes on this machine.

It observes processes, result files, progress files and the store into one `Observed`, lets the core decide, carries
the decision out, and looks again. All rules (what may start, what is tried again, when it is over) are the core's, the
same as on a cluster; only what fits on this machine at once is decided here.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from stagecoach_api.artifacts import Manifest, Pointer, artifact_prefix, pointer_key
from stagecoach_api.names import ENV_CACHE_DIR, ENV_PROGRESS_FILE, ENV_RESULT_FILE, ENV_THREADS, ENV_WORK_DIR
from stagecoach_api.outcomes import Cause
from stagecoach_api.store import NotFound, Store, Unreachable
from stagecoach_cli import processes
from stagecoach_cli.artifacts import ask
from stagecoach_cli.attempts import LiveAttempt, ended_record, observed_end
from stagecoach_cli.machine import HEAVY_KINDS, Machine, admits, num_ranks, num_threads
from stagecoach_cli.view import FINISHED, Snapshot, StageRow, View
from stagecoach_cli.workspace import (
    AttemptFolder,
    AttemptRecord,
    RunFolder,
    RunRecord,
    StageRecord,
    Workspace,
    write_atomically,
)
from stagecoach_core.decide import decide
from stagecoach_core.resolve import artifacts_of, resolved_inputs, resolved_stage
from stagecoach_core.values import (
    Action,
    Decision,
    Found,
    LookUp,
    Missing,
    Observed,
    Plan,
    RunState,
    StageState,
    StageView,
    Start,
    Stop,
)

LAUNCHER = (sys.executable, "-m", "stagecoach_trainer.launcher")
"""What an attempt runs as."""

POLL_SECONDS = 0.2
GRACE_SECONDS = 330.0
"""How long an attempt that was asked to stop may take before it is killed: longer than the launcher itself waits."""

STORE_PAUSE_SECONDS = 15.0
"""How long a store that does not answer is left alone."""

ORPHANED = "its driver is gone"


@dataclass(frozen=True)
class Job:
    """A run, planned, and where and how it is to be worked on."""

    plan: Plan
    file: Path
    workspace: Workspace
    store: Store
    machine: Machine
    storage_endpoint: str | None = None
    storage_region: str | None = None
    nproc: int | None = None
    """Ranks of training stages. None: what their resources say, as far as the machine goes."""
    suspend: bool = False
    """The run itself says that it is to stop (`spec.suspend`)."""
    selected: frozenset[str] | None = None
    forced: frozenset[str] = frozenset()
    launcher: tuple[str, ...] = LAUNCHER
    poll_seconds: float = POLL_SECONDS
    grace_seconds: float = GRACE_SECONDS
    store_pause_seconds: float = STORE_PAUSE_SECONDS


@dataclass(frozen=True)
class Outcome:
    """How the work on a run ended."""

    decision: Decision
    snapshot: Snapshot
    manifests: Mapping[str, Manifest]
    """Manifests of the finished stages, by stage digest."""
    interrupted: bool


@dataclass
class Driver:
    """Works on one run until it is finished, fails, or is interrupted. The caller holds the run's lock."""

    job: Job
    view: View
    interrupts: Callable[[], int] = lambda: 0
    """How often the user has asked to stop."""
    clock: Callable[[], float] = time.time

    _since: float = 0.0
    _ended: list[AttemptRecord] = field(default_factory=list)
    _living: dict[tuple[str, int], LiveAttempt] = field(default_factory=dict)
    _answers: dict[str, Found | Missing] = field(default_factory=dict)
    _manifests: dict[str, Manifest] = field(default_factory=dict)
    _pointed: dict[str, Found] = field(default_factory=dict)
    _store_answered: bool = False
    _store_again_at: float = 0.0
    _saved: RunRecord | None = None
    _told: int = 0
    _ended_event: threading.Event = field(default_factory=threading.Event)

    def run(self) -> Outcome:
        """Work on the run. Raises StoreError and OSError; living attempts are stopped first, whatever happens."""
        self._since = self.clock()
        self._remember()
        try:
            while True:
                self._ended_event.clear()
                decision, snapshot, acted = self._step()
                if not self._living and decision.state is not RunState.PROGRESSING and self._all_told(decision):
                    return Outcome(decision, snapshot, self._manifests, interrupted=self.interrupts() > 0)
                if not acted:
                    self._ended_event.wait(self.job.poll_seconds)
        finally:
            self._stop_all()

    # -- one turn ------------------------------------------------------------------------------------------------------

    def _step(self) -> tuple[Decision, Snapshot, bool]:
        """Observe, decide, act, tell. Returns also whether anything was done, so that the next turn is due at once."""
        self._reap()
        self._heed_interrupts()
        now = self.clock()
        decision = decide(self.job.plan, self._observed(), now)
        views = dict(decision.stages)
        done = [action for action in decision.actions if self._carry_out(action, views)]
        self._point(views)
        self._save(decision, views)
        snapshot = self._snapshot(decision, views, now)
        if not any(isinstance(action, LookUp) for action in done):
            self.view.show(snapshot)
        return decision, snapshot, bool(done)

    def _observed(self) -> Observed:
        for attempt in self._living.values():
            attempt.refresh()
        return Observed(
            attempts=tuple(
                [observed_end(record) for record in self._ended]
                + [attempt.observed() for attempt in self._living.values()]
            ),
            artifacts=dict(self._answers),
            since=self._since,
            suspend=self.job.suspend or self.interrupts() > 0,
            selected=self.job.selected,
            forced=self.job.forced,
            forced_since=self._since,
        )

    def _snapshot(self, decision: Decision, views: Mapping[str, StageView], now: float) -> Snapshot:
        return Snapshot(
            run=self.job.plan.run,
            storage=self.job.store.uri,
            state=decision.state,
            now=now,
            rows=tuple(self._row(name, view) for name, view in views.items()),
            message=decision.message,
        )

    def _row(self, name: str, view: StageView) -> StageRow:
        living = next((item for key, item in self._living.items() if key[0] == name), None)
        manifest = self._manifests.get(view.digest or "") if view.state in FINISHED else None
        return StageRow(
            name=name,
            kind=self.job.plan.stages[name].stage.kind,
            view=view,
            progress=None if living is None else living.progress,
            started=None if living is None else living.record.started,
            seconds=None if manifest is None else manifest.seconds,
            ranks=self._ranks(name),
            log=self._run_folder.attempt(name, view.attempt).log if view.attempt else None,
        )

    # -- actions -------------------------------------------------------------------------------------------------------

    def _carry_out(self, action: Action, views: dict[str, StageView]) -> bool:
        """Do what was decided; return whether it was done. What was not is decided again."""
        if isinstance(action, LookUp):
            return self._with_store(lambda: self._look_up(action))
        if isinstance(action, Stop):
            self._stop(action)
            return True
        return self._start(action, views)

    def _with_store(self, act: Callable[[], None]) -> bool:
        """Do something that needs the store; return whether it answered.

        A store that has answered before, and then does not after all its own retries, is given time: stages that run
        need it only at their end. Raises StoreError for everything else.
        """
        if self.clock() < self._store_again_at:
            return False
        try:
            act()
        except Unreachable as error:
            if not self._store_answered:
                raise
            self._store_again_at = self.clock() + self.job.store_pause_seconds
            self.view.say(f"storage does not answer, trying again in {self.job.store_pause_seconds:.0f} s: {error}")
            return False
        self._store_answered = True
        return True

    def _look_up(self, action: LookUp) -> None:
        """Ask the store whether a stage's work is done."""
        answer, manifest = ask(self.job.store, action.digest, self.clock())
        self._answers[action.digest] = answer
        if manifest is not None:
            self._manifests[action.digest] = manifest

    def _start(self, action: Start, views: dict[str, StageView]) -> bool:
        """Start an attempt if this machine has room for it; else say what it waits for."""
        kind = self.job.plan.stages[action.stage].stage.kind
        running = [self.job.plan.stages[stage].stage.kind for stage, _ in self._living if stage in self.job.plan.stages]
        if not admits(self.job.machine, kind, running):
            view = views[action.stage]
            views[action.stage] = _waiting(view, room(self.job.machine, kind))
            return False
        anew = action.stage in self.job.forced and not self._tried_since(action)
        if anew and not self._with_store(lambda: self._forget(action.digest)):
            return False
        self._launch(action, artifacts_of(views))
        return True

    def _forget(self, digest: str) -> None:
        """Delete an artifact and its checkpoints: they would be found again, and nothing overwrites an artifact."""
        self.job.store.delete(artifact_prefix(digest))
        shutil.rmtree(self.job.workspace.checkpoints(digest), ignore_errors=True)

    def _launch(self, action: Start, artifacts: Mapping[str, Found]) -> None:
        planned = self.job.plan.stages[action.stage]
        ranks = self._ranks(action.stage)
        folder = self._run_folder.attempt(action.stage, action.number)
        processes.end_all(folder.stage_file)
        _make_empty(folder)
        inputs = resolved_inputs(planned, artifacts)
        told = resolved_stage(
            self.job.plan,
            action.stage,
            action.digest,
            inputs,
            action.number,
            self.job.store.uri,
            self.job.storage_endpoint,
        ).model_copy(update={"num_nodes": 1, "ranks_per_node": ranks})
        write_atomically(folder.stage_file, told.model_dump_json(indent=1).encode())
        started = self.clock()
        process = processes.start(
            self.job.launcher, self._environment(folder, ranks), folder.stage_file, folder.log, self._ended_event.set
        )
        record = AttemptRecord(
            stage=action.stage,
            digest=action.digest,
            number=action.number,
            ranks=ranks,
            pid=process.pid,
            process_created=process.created,
            started=started,
        )
        self._living[action.stage, action.number] = LiveAttempt(record, folder, process)

    def _environment(self, folder: AttemptFolder, ranks: int) -> dict[str, str]:
        environment = {
            ENV_WORK_DIR: str(folder.path),
            ENV_CACHE_DIR: str(self.job.workspace.cache),
            ENV_RESULT_FILE: str(folder.result),
            ENV_PROGRESS_FILE: str(folder.progress),
            ENV_THREADS: str(num_threads(self.job.machine, ranks)),
            "PYTHONUNBUFFERED": "1",
        }
        if self.job.storage_region is not None:
            environment["AWS_DEFAULT_REGION"] = self.job.storage_region
        return environment

    def _stop(self, action: Stop) -> None:
        attempt = self._living.get((action.stage, action.number))
        if attempt is not None and not attempt.record.stopping:
            self._ask_to_stop(attempt, action.reason, action.cause)

    def _ask_to_stop(self, attempt: LiveAttempt, reason: str, cause: Cause) -> None:
        attempt.record = attempt.record.model_copy(
            update={"stopping": reason, "stopping_since": self.clock(), "stop_cause": cause}
        )
        attempt.process.terminate()

    # -- attempts ------------------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Take up what an earlier driver of this run left behind: ended attempts, and processes that may still live."""
        record = self._run_folder.load()
        for attempt in () if record is None else record.attempts:
            if attempt.ended is not None:
                self._ended.append(attempt)
                continue
            folder = self._run_folder.attempt(attempt.stage, attempt.number)
            process = processes.adopt(attempt.pid, attempt.process_created, folder.stage_file)
            live = LiveAttempt(attempt, folder, process)
            self._living[attempt.stage, attempt.number] = live
            if process.is_alive:
                # Its launcher has seen our predecessor's pipe close and is stopping already.
                self.view.say(f"{attempt.stage}: attempt {attempt.number} is still stopping, its driver was killed")
                self._ask_to_stop(live, ORPHANED, Cause.PREEMPTION)

    def _reap(self) -> None:
        """Write down attempts whose process has ended, and kill those that do not end when asked."""
        now = self.clock()
        for key, attempt in list(self._living.items()):
            if attempt.process.is_alive:
                since = attempt.record.stopping_since
                if since is not None and now - since > self.job.grace_seconds:
                    attempt.process.kill()
                continue
            attempt.process.sweep()
            attempt.refresh()
            record = ended_record(attempt, now)
            self._ended.append(record)
            del self._living[key]
            self._answers.pop(record.digest, None)
            if record.cause is None:
                # What it made lies in the store.
                shutil.rmtree(attempt.folder.output, ignore_errors=True)

    def _heed_interrupts(self) -> None:
        """Say what Ctrl-C does; at the second one, kill."""
        count = self.interrupts()
        if count and not self._told and self._living:
            names = ", ".join(stage for stage, _ in self._living)
            self.view.say(f"stopping {names} at a checkpoint; press Ctrl-C again to kill")
        self._told = count
        if count > 1:
            for attempt in self._living.values():
                attempt.process.kill()

    def _stop_all(self) -> None:
        """Leave no process behind. There are living ones only when an error ends the driver."""
        for attempt in self._living.values():
            attempt.process.terminate()
        deadline = time.monotonic() + self.job.grace_seconds
        while any(attempt.process.is_alive for attempt in self._living.values()) and time.monotonic() < deadline:
            if self.interrupts() > 1:
                break
            time.sleep(self.job.poll_seconds)
        for attempt in self._living.values():
            attempt.process.kill()

    def _tried_since(self, action: Start) -> bool:
        """Whether this invocation has worked on the stage at this digest already."""
        return any(
            record.stage == action.stage and record.digest == action.digest and record.started >= self._since
            for record in self._ended
        )

    def _ranks(self, name: str) -> int:
        return num_ranks(self.job.plan.stages[name].stage, self.job.machine, self.job.nproc)

    # -- what is written down ------------------------------------------------------------------------------------------

    @property
    def _run_folder(self) -> RunFolder:
        return self.job.workspace.run(self.job.plan.namespace, self.job.plan.run)

    def _save(self, decision: Decision, views: Mapping[str, StageView]) -> None:
        """Write the run's record where it has changed."""
        attempts = sorted(
            [*self._ended, *(attempt.record for attempt in self._living.values())],
            key=lambda record: (record.started, record.stage, record.number),
        )
        record = RunRecord(
            namespace=self.job.plan.namespace,
            run=self.job.plan.run,
            file=str(self.job.file),
            storage_uri=self.job.store.uri,
            storage_endpoint=self.job.storage_endpoint,
            storage_region=self.job.storage_region,
            state=decision.state,
            message=decision.message,
            updated=0.0,
            stages={name: self._stage_record(name, view) for name, view in views.items()},
            attempts=tuple(attempts),
        )
        if record != self._saved:
            self._run_folder.save(record.model_copy(update={"updated": self.clock()}))
            self._saved = record

    def _stage_record(self, name: str, view: StageView) -> StageRecord:
        manifest = self._manifests.get(view.digest or "") if view.state in FINISHED else None
        return StageRecord(
            kind=self.job.plan.stages[name].stage.kind,
            state=view.state,
            digest=view.digest,
            content_digest=None if view.artifact is None else view.artifact.content_digest,
            uri=None if view.artifact is None else view.artifact.uri,
            attempt=view.attempt,
            ranks=self._ranks(name),
            restarts=dict(view.restarts),
            waiting_for=view.waiting_for,
            message=view.message,
            seconds=None if manifest is None else manifest.seconds,
        )

    def _point(self, views: Mapping[str, StageView]) -> None:
        """Write the pointers of newly finished stages into the store."""
        for name, view in views.items():
            found = view.artifact
            if found is None or view.state not in FINISHED or self._pointed.get(name) == found:
                continue
            pointer = Pointer(
                stage=name,
                kind=self.job.plan.stages[name].stage.kind,
                stage_digest=found.stage_digest,
                content_digest=found.content_digest,
                uri=found.uri,
                cached=view.state is StageState.CACHED,
                recorded=self.clock(),
            )
            if self._with_store(partial(self._write_pointer, pointer)):
                self._pointed[name] = found

    def _write_pointer(self, pointer: Pointer) -> None:
        key = pointer_key(self.job.plan.namespace, self.job.plan.run, pointer.stage)
        if not self._is_written(key, pointer):
            self.job.store.write(key, pointer.model_dump_json(indent=1).encode() + b"\n")

    def _all_told(self, decision: Decision) -> bool:
        """Whether every finished stage has its pointer; who is interrupted does not wait for that."""
        finished = {name for name, view in decision.stages.items() if view.state in FINISHED}
        return self.interrupts() > 0 or finished <= self._pointed.keys()

    def _is_written(self, key: str, pointer: Pointer) -> bool:
        with contextlib.suppress(NotFound, ValueError):
            known = Pointer.model_validate_json(self.job.store.read(key))
            return known == pointer.model_copy(update={"cached": known.cached, "recorded": known.recorded})
        return False


def room(machine: Machine, kind: str) -> str:
    """Return what a stage that does not fit beside the living ones waits for."""
    if kind in HEAVY_KINDS:
        slots = machine.heavy_slots
        return f"room to run: {machine.cores} cores take {slots} training or measuring stage{'s' * (slots > 1)} at once"
    return f"room to run: {machine.cores} cores take {machine.light_slots} such stages at once"


def _waiting(view: StageView, reason: str) -> StageView:
    return StageView(
        state=StageState.PENDING,
        digest=view.digest,
        artifact=view.artifact,
        attempt=view.attempt,
        restarts=view.restarts,
        waiting_for=reason,
        message=view.message,
    )


def _make_empty(folder: AttemptFolder) -> None:
    """Make the attempt's folder; one of an earlier life of the run, whose record was lost, goes."""
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)
