"""The local driver: stages as processes on this machine.

Each turn observes processes, result files, progress files and the store as one `Observed`, calls the core's `decide`,
and carries out the decision. All rules (what may start, what is retried, when the run is over) are the core's and the
same as on a cluster; the driver only limits how many stages run concurrently on this machine.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from stagecoach_api.artifacts import Manifest, artifact_prefix
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.outcomes import Cause
from stagecoach_api.status import FINISHED
from stagecoach_api.stores.lookup import find_manifest
from stagecoach_api.writers import read_lease
from stagecoach_core.artifacts import look_up_result, without_own
from stagecoach_core.decide import decide
from stagecoach_core.resolve import artifacts_of
from stagecoach_core.snapshot import Snapshot, StageRow, View
from stagecoach_core.values import (
    Action,
    Attempt,
    Claimed,
    Decision,
    Found,
    LookUp,
    Missing,
    Observed,
    RunState,
    StageState,
    StageView,
    Start,
    Stop,
)
from stagecoach_local import processes
from stagecoach_local.attempts import LiveAttempt, ended_record, observed_end
from stagecoach_local.claims import Claims
from stagecoach_local.launch import launch
from stagecoach_local.machine import Machine, admits
from stagecoach_local.records import RunRecorder
from stagecoach_local.run_job import Job
from stagecoach_local.store_outages import StoreOutages
from stagecoach_local.workspace import AttemptRecord

ORPHANED = "its driver has died"


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
    """Works on one run until it is complete, failed or interrupted. The caller holds the run's lock."""

    job: Job
    view: View
    interrupts: Callable[[], int] = lambda: 0
    """Number of the user's stop requests; from the second one on, attempts are killed."""
    cancelled: Callable[[], bool] = lambda: False
    """Whether the user has cancelled the run."""
    clock: Callable[[], float] = time.time

    _since: float = 0.0
    _past: set[tuple[str, int]] = field(default_factory=set)
    """Attempts that had ended before this driver started, by stage and number."""
    _first: dict[str, int] = field(default_factory=dict)
    """Number of the first attempt that this driver may start, by stage, if it is not 1."""
    _ended: list[AttemptRecord] = field(default_factory=list)
    _live: dict[tuple[str, int], LiveAttempt] = field(default_factory=dict)
    _artifacts: dict[str, Found | Missing | Claimed] = field(default_factory=dict)
    """Results of look-ups in the store, by stage digest."""
    _manifests: dict[str, Manifest] = field(default_factory=dict)
    _interrupts_handled: int = 0
    _ended_event: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._outages = StoreOutages(self.job.store_pause_seconds, self.view.notify, self.clock)
        self._recorder = RunRecorder(self.job, self._outages)
        self._claims = Claims(self.job.store)

    def run(self) -> Outcome:
        """Work on the run. Raises StoreError and OSError, after live attempts have been stopped."""
        self._since = self.clock()
        self._restore_attempts()
        try:
            while True:
                self._ended_event.clear()  # before processes are polled, so that no exit is missed by the wait below
                decision, snapshot, acted = self._step()
                if self._is_over(decision):
                    return Outcome(decision, snapshot, self._manifests, interrupted=self.interrupts() > 0)
                if not acted:
                    self._ended_event.wait(self.job.poll_seconds)
        finally:
            self._stop_all()

    def _is_over(self, decision: Decision) -> bool:
        """Whether nothing is left to do. After an interrupt, pending pointers are not waited for."""
        if self._live or decision.state is RunState.PROGRESSING:
            return False
        return self.interrupts() > 0 or self._recorder.is_complete(decision.stages)

    # -- one turn ------------------------------------------------------------------------------------------------------

    def _step(self) -> tuple[Decision, Snapshot, bool]:
        """Observe, decide, act and report; return the decision, its snapshot, and whether an action was carried out.

        If one was, the next turn follows at once, since its effects may allow further actions.
        """
        self._reap()  # first, so that the decision is based on the newest ends
        self._handle_interrupts()
        self._stop_superseded()
        now = self.clock()
        decision = decide(self.job.plan, self._observed(), now)
        views = dict(decision.stages)
        # Every action is tried, even after one failed: a full machine must not delay a look-up.
        done = [action for action in decision.actions if self._carry_out(action, views)]
        self._recorder.write_pointers(views, now)
        records = [*self._ended, *(attempt.record for attempt in self._live.values())]
        # After the actions. Processes of a driver killed in between are not recorded, but stop when its pipe closes.
        self._recorder.save(decision, views, self._manifests, records, now)
        snapshot = self._snapshot(decision, views, now)
        # After a look-up the stage's state is not known before the next turn, which follows at once.
        if not any(isinstance(action, LookUp) for action in done):
            self.view.show(snapshot)
        return decision, snapshot, bool(done)

    def _observed(self) -> Observed:
        for attempt in self._live.values():
            self._refresh(attempt)
        return Observed(
            attempts=tuple(
                [self._observed_end(record) for record in self._ended]
                + [attempt.observed() for attempt in self._live.values()]
            ),
            artifacts=dict(self._artifacts),
            suspend=self.job.suspend or self.interrupts() > 0,
            cancel=self.job.cancel or self.cancelled(),
            selected=self.job.selected,
            keep_going=self.job.keep_going,
            forced={name: self._first.get(name, 1) for name in self.job.forced},
        )

    def _observed_end(self, record: AttemptRecord) -> Attempt:
        return replace(observed_end(record), past=(record.stage, record.number) in self._past)

    def _snapshot(self, decision: Decision, views: Mapping[str, StageView], now: float) -> Snapshot:
        return Snapshot(
            run=self.job.plan.run,
            storage=self.job.store.uri,
            state=decision.state,
            now=now,
            rows=tuple(self._row(name, view) for name, view in views.items()),
            message=decision.message,
            started=self._since,
        )

    def _refresh(self, attempt: LiveAttempt) -> None:
        for warning in attempt.refresh():
            self.view.notify(f"{attempt.record.stage}: warning: {warning}")

    def _row(self, name: str, view: StageView) -> StageRow:
        live = next((item for key, item in self._live.items() if key[0] == name), None)
        manifest = self._manifests.get(view.digest or "") if view.state in FINISHED else None
        newest = self._newest(name, view)
        return StageRow(
            name=name,
            kind=self.job.kind(name),
            view=view,
            progress=None if live is None else live.progress,
            started=None if live is None else live.record.started,
            seconds=None if manifest is None else manifest.seconds,
            ranks=self.job.ranks(name),
            log=self.job.folder.attempt(name, view.attempt).log if view.attempt else None,
            eta=None if live is None else live.pace.end(),
            expected=self.job.expected.get(name),
            resumed_from=None if newest is None else newest.resumed_from,
            saved_step=None if newest is None or newest.ended is None else newest.last_step,
        )

    def _newest(self, name: str, view: StageView) -> AttemptRecord | None:
        """Return the record of the stage's newest attempt."""
        records = [*self._ended, *(attempt.record for attempt in self._live.values())]
        newest = [item for item in records if (item.stage, item.number) == (name, view.attempt)]
        return newest[-1] if newest else None

    # -- actions -------------------------------------------------------------------------------------------------------

    def _carry_out(self, action: Action, views: dict[str, StageView]) -> bool:
        """Carry out an action; return whether that succeeded. If not, the next turn decides again."""
        if isinstance(action, LookUp):
            return self._outages.call(lambda: self._look_up(action))
        if isinstance(action, Stop):
            self._stop(action)
            return True
        return self._start(action, views)

    def _look_up(self, action: LookUp) -> None:
        """Look up a stage's artifact in the store."""
        asked_at = self.clock()
        manifest = find_manifest(self.job.store, action.digest)
        # A cluster's run, or a laptop's, may make the artifact in this storage at the moment.
        lease = None if manifest is not None else read_lease(self.job.store, action.digest)
        answer = look_up_result(action.digest, manifest, self.job.store.uri, asked_at, lease)
        self._artifacts[action.digest] = without_own(answer, self.job.folder.uid())
        if manifest is not None:
            self._manifests[action.digest] = manifest

    def _start(self, action: Start, views: dict[str, StageView]) -> bool:
        """Start an attempt if this machine has a free slot for it; otherwise show in `views` what it waits for."""
        kind = self.job.kind(action.stage)
        running = [self.job.kind(stage) for stage, _ in self._live if stage in self.job.plan.stages]
        if not admits(self.job.machine, kind, running):
            waiting = slot_message(self.job.machine, kind)
            views[action.stage] = replace(views[action.stage], state=StageState.PENDING, waiting_for=waiting)
            return False
        # Only the first attempt of this invocation starts from scratch; its retries resume from its checkpoints.
        rerun = action.stage in self.job.forced and not self._tried_since(action)
        if not self._claim(action, views, rerun):
            return False
        if rerun and not self._outages.call(lambda: self._delete_artifact(action.digest)):
            return False
        attempt = launch(
            self.job,
            action,
            artifacts_of(views),
            self.clock(),
            self._ended_event.set,
            self._claims.inherited(action.digest),
        )
        self._live[action.stage, action.number] = attempt
        return True

    def _claim(self, action: Start, views: dict[str, StageView], rerun: bool) -> bool:
        """Claim the stage's digest; return whether it may start. If not, `views` shows what it waits for."""
        if self._claims.holds(action.digest) and not self._claims.is_lost(action.digest):
            return True
        holders: list[str | None] = []
        if not self._outages.call(lambda: holders.append(self._claims.take(action.digest))):
            return False
        if holders[0] is not None:
            waiting = f"{holders[0]}, which makes the same artifact in this storage"
            views[action.stage] = replace(views[action.stage], state=StageState.PENDING, waiting_for=waiting)
            return False
        # Its last holder may have finished the artifact after this driver had looked for it.
        looked = self._outages.call(lambda: self._look_up(LookUp(action.stage, action.digest)))
        if looked and (rerun or isinstance(self._artifacts[action.digest], Missing)):
            return True
        self._claims.release(action.digest)
        return False

    def _delete_artifact(self, digest: str) -> None:
        """Delete an artifact and its checkpoints: a new attempt would resume from them, and artifacts are immutable."""
        self.job.store.delete(artifact_prefix(digest))
        shutil.rmtree(self.job.workspace.checkpoints(digest), ignore_errors=True)

    def _stop(self, action: Stop) -> None:
        attempt = self._live.get((action.stage, action.number))
        if attempt is not None and not attempt.record.stopping:
            self._ask_to_stop(attempt, action.reason, action.cause)

    def _ask_to_stop(self, attempt: LiveAttempt, reason: str, cause: Cause) -> None:
        attempt.record = attempt.record.model_copy(
            update={"stopping": reason, "stopping_since": self.clock(), "stop_cause": cause}
        )
        attempt.process.terminate()

    # -- attempts ------------------------------------------------------------------------------------------------------

    def _restore_attempts(self) -> None:
        """Load the attempts of earlier drivers of this run; the processes of some may still be running."""
        record = self.job.folder.load()
        for attempt in () if record is None else record.attempts:
            self._first[attempt.stage] = max(self._first.get(attempt.stage, 1), attempt.number + 1)
            if attempt.ended is not None:
                self._past.add((attempt.stage, attempt.number))
                self._ended.append(attempt)
                continue
            folder = self.job.folder.attempt(attempt.stage, attempt.number)
            process = processes.adopt(attempt.pid, attempt.process_created, folder.stage_file)
            live = LiveAttempt(attempt, folder, process)
            self._live[attempt.stage, attempt.number] = live
            if process.is_alive:
                # Its launcher has read end-of-file from the previous driver's pipe and is already stopping.
                self.view.notify(f"{attempt.stage}: attempt {attempt.number} is still stopping, its driver was killed")
                self._ask_to_stop(live, ORPHANED, Cause.PREEMPTION)
            else:
                self._past.add((attempt.stage, attempt.number))

    def _reap(self) -> None:
        """Record attempts whose process has ended; kill those that exceed the grace period."""
        now = self.clock()
        for key, attempt in list(self._live.items()):
            if attempt.process.is_alive:
                since = attempt.record.stopping_since
                if since is not None and now - since > self.job.grace_seconds:
                    attempt.process.kill()
                continue
            attempt.process.sweep()  # no worker may survive into the next attempt
            self._refresh(attempt)
            record = ended_record(attempt, now, self._ended_at(attempt.record.stage, attempt.record.digest))
            self._ended.append(record)
            del self._live[key]
            self._artifacts.pop(record.digest, None)  # the attempt may have published: look the artifact up again
            attempt.folder.drop_scratch()
            self._claims.release(record.digest)

    def _ended_at(self, stage: str, digest: str) -> list[Attempt]:
        """Return the ended attempts of this invocation at a stage and digest."""
        return [
            observed_end(record)
            for record in self._ended
            if (record.stage, record.digest) == (stage, digest) and (record.stage, record.number) not in self._past
        ]

    def _handle_interrupts(self) -> None:
        """After the first interrupt, show what it does (the core stops the attempts); after the second, kill them."""
        count = self.interrupts()
        if count and not self._interrupts_handled and self._live:
            names = ", ".join(stage for stage, _ in self._live)
            self.view.notify(f"stopping {names} at a checkpoint; press Ctrl-C again to kill")
        self._interrupts_handled = count
        if count > 1:
            for attempt in self._live.values():
                attempt.process.kill()

    def _stop_all(self) -> None:
        """Stop all attempts, so that no process is left. Some are live only if an error ends the driver."""
        for attempt in self._live.values():
            attempt.process.terminate()
        deadline = time.monotonic() + self.job.grace_seconds
        while any(attempt.process.is_alive for attempt in self._live.values()) and time.monotonic() < deadline:
            if self.interrupts() > 1:
                break
            time.sleep(self.job.poll_seconds)
        for attempt in self._live.values():
            attempt.process.kill()
        self._claims.release_all()

    def _stop_superseded(self) -> None:
        """Stop attempts whose claim another driver has taken over, after this one was unreachable for long."""
        for attempt in self._live.values():
            if self._claims.is_lost(attempt.record.digest) and not attempt.record.stopping:
                self._ask_to_stop(attempt, "another driver has taken over its work", Cause.PREEMPTION)

    def _tried_since(self, action: Start) -> bool:
        """Whether this invocation has already tried the stage at this digest."""
        return any(
            (record.stage, record.digest) == (action.stage, action.digest)
            and record.number >= self._first.get(action.stage, 1)
            for record in self._ended
        )


def slot_message(machine: Machine, kind: str) -> str:
    """Return what a stage waits for that this machine has no free slot for."""
    if STAGE_KINDS[kind].heavy:
        slots = machine.heavy_slots
        stages = f"training or evaluation stage{'s' * (slots > 1)}"
        return f"a free slot: {machine.cores} cores run {slots} {stages} at a time"
    return f"a free slot: {machine.cores} cores run {machine.light_slots} stages of this kind at a time"
