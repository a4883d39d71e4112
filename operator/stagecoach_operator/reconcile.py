"""Reconciliation of one run: observe, decide, act, report.

It is level-triggered: everything follows from the current state, and events only trigger it. The order of the writes
makes a kill between any two of them harmless. The reason an attempt ends is persisted before its pods are deleted; a
new attempt is created under a deterministic name before the status mentions it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stagecoach_api import names
from stagecoach_api.outcomes import FAULT_CHARACTERS
from stagecoach_api.status import AttemptStatus, ConditionStatus, ConditionType, Reason, TrainingRunStatus
from stagecoach_api.status_reading import with_unknown
from stagecoach_core.decide import decide
from stagecoach_core.policies.avoidance import AvoidedNode
from stagecoach_core.resolve import artifacts_of
from stagecoach_core.values import (
    AttemptState,
    Decision,
    LookUp,
    Observed,
    Start,
    Stop,
)
from stagecoach_operator.artifact_lookup import ArtifactLookups
from stagecoach_operator.artifact_pointers import Pointers
from stagecoach_operator.attempt_client import AttemptClient
from stagecoach_operator.attempt_history import forgotten_of, records_of
from stagecoach_operator.attempt_times import waiting_since, without_future
from stagecoach_operator.confirmation import confirm, confirm_pods
from stagecoach_operator.events import EventReason, RunEvent, events_between
from stagecoach_operator.kube import CONFIG_MAPS, AlreadyExists, ObjectNotFound
from stagecoach_operator.lost_nodes import loss_text
from stagecoach_operator.node_failures import NodeFailures, as_text
from stagecoach_operator.object_cache import Children
from stagecoach_operator.object_views import PodView, RunView
from stagecoach_operator.observe import ObservedAttempt, Signals, is_finished, observe
from stagecoach_operator.plan_maker import PlanMaker
from stagecoach_operator.planning import (
    FrozenPlan,
    Rejection,
    from_config_map,
    plan_config_map,
    plan_name,
    spec_digest,
)
from stagecoach_operator.pod_startup import STUCK_SECONDS
from stagecoach_operator.progress_reports import Hearing, ProgressReports
from stagecoach_operator.releases import NO_OTHER_NODE
from stagecoach_operator.requests import NO_REQUEST, AttemptKey, Request, request_of
from stagecoach_operator.run_claim import LeftAlone, objection_to
from stagecoach_operator.run_memory import DIAGNOSE_SECONDS, FLUSH_SECONDS, MERGE_SECONDS, RunMemory
from stagecoach_operator.start_checks import StartChecks, Starting
from stagecoach_operator.status import (
    StatusInputs,
    as_json,
    merge_patch,
    milestones,
    rejected_status,
    without_progress,
    working_status,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReconcileContext:
    """A run as observed now, and the decision about it."""

    run: RunView
    frozen: FrozenPlan
    attempts: Mapping[AttemptKey, ObservedAttempt]
    decision: Decision
    now: float
    request: Request = NO_REQUEST

    def actions(self, kind: type[Any]) -> list[Any]:
        return [action for action in self.decision.actions if isinstance(action, kind)]

    def living(self) -> list[ObservedAttempt]:
        return [attempt for attempt in self.attempts.values() if attempt.state is not AttemptState.ENDED]

    def to_end(self) -> list[ObservedAttempt]:
        """Return the attempts of which something must be deleted, with the reason: failed ones and those to stop."""
        stops = {(stop.stage, stop.number): stop for stop in self.actions(Stop)}
        attempts = [stopped(item, stops[key]) if key in stops else item for key, item in self.attempts.items()]
        return [item for item in attempts if (item.deletion_reason and item.jobset is not None) or item.abandoned_pods]

    def lost_pods(self) -> list[PodView]:
        return [pod for attempt in self.attempts.values() for pod in attempt.lost_pods]


@dataclass
class Reconciler:
    """Reconciles runs. Reconciliations of one run must not overlap; `worker` guarantees it."""

    client: AttemptClient
    lookups: ArtifactLookups
    planner: PlanMaker
    reports: ProgressReports
    enqueue: Callable[[str], None]
    """Requests another reconciliation of the run with this UID."""
    record_events: Callable[[RunView, Sequence[RunEvent]], None]
    """Posts events in the background."""
    clock: Callable[[], float] = time.time
    observe_status: Callable[[TrainingRunStatus, TrainingRunStatus], None] = lambda before, after: None
    """Called with the status before and after each write, for metrics."""
    memories: dict[str, RunMemory] = field(default_factory=dict)
    node_failures: NodeFailures = field(default_factory=NodeFailures)

    def __post_init__(self) -> None:
        self._pointers = Pointers(self.lookups)
        self._checks = StartChecks(self.lookups, self.memories, self.enqueue)
        self._left = LeftAlone(self.record_events)

    async def reconcile(self, uid: str) -> float | None:
        """Reconcile a run once; return when to do so again if nothing happens, in seconds since the epoch.

        Raises Conflict if the run has changed meanwhile, and Unavailable. The next reconciliation starts from scratch.
        """
        run = self.client.cache.runs.get(uid)
        if run is None:
            self._forget(uid)
            return None
        if run.meta.deleting:
            await self._finalize(run)
            return None
        objection = objection_to(run, self.client.settings.installation)
        if objection:
            self._left.report(run, objection)
            return None
        if names.FINALIZER in run.finalizers:
            run = await self.client.remove_finalizer(run)
        if is_at_rest(run, self.client.cache.of_run(uid)):
            self.node_failures.note(uid, records_of(run.status), self.clock())
            return None
        memory = self.memories.setdefault(uid, RunMemory(first_seen=self.clock()))
        plan = await self._plan(run, memory)
        if isinstance(plan, FrozenPlan):
            return await self._carry_out(run, plan, memory)
        # Without a plan yet: the planner enqueues the run when it has been made.
        return None if plan is None else await self._reject(run, plan, memory)

    async def _carry_out(self, run: RunView, plan: FrozenPlan, memory: RunMemory) -> float | None:
        """Observe, decide, act, report."""
        await self._confirm(run, memory)
        context = self._observe(run, plan, memory)
        ending, lost = context.to_end(), memory.due_for_removal(context.lost_pods(), context.now)
        # Nothing is started in the same turn: the decision was made while these attempts were live.
        if ending or lost:
            return await self._end(context, ending, lost, memory)
        lookups_due = self._look_up(context)
        if await self._start(context, memory):
            memory.created_at = self.clock()
            # Our own writes are in the cache already, so the status below mentions the attempts just created.
            context = self._observe(self.client.cache.runs.get(run.meta.uid, run), plan, memory)
        elif context.actions(Start):
            context = self._observe(run, plan, memory)  # the checks may have found another run at the same work
        await self._diagnose(context, memory)
        deferred_until = status_deferred_until(context, memory)
        if deferred_until is not None:
            return deferred_until
        write_due = await self._save(context, memory)
        self._pointers.point(context.run, context.frozen, context.decision.stages, context.now)
        return earliest(
            context.decision.look_again_at,
            lookups_due,
            write_due,
            memory.unblocked_at(),
            memory.confirmed.look_again_at,
            memory.retry_rejected_at(),
            *(moment for attempt in context.attempts.values() for moment in recheck_times(attempt, context.now)),
        )

    # -- observing -----------------------------------------------------------------------------------------------------

    async def _confirm(self, run: RunView, memory: RunMemory) -> None:
        """Read the JobSets and pods that seem to be gone, before anything follows from that."""
        records = known_records(run, memory, self.clock())
        kube, cache = self.client.kube, self.client.cache
        await confirm(kube, cache, run, records, memory.confirmed, self.clock())
        await confirm_pods(kube, cache, run, records, memory.confirmed, self.clock())

    def _observe(self, run: RunView, frozen: FrozenPlan, memory: RunMemory) -> ReconcileContext:
        now = self.clock()
        records = known_records(run, memory, now)
        latest = {key: self.reports.latest((run.meta.uid, *key)) for key in records}
        reports = {key: report for key, report in latest.items() if report is not None}
        children = self.client.cache.of_run(run.meta.uid).by_own_clock(memory.deleted_at, now)
        hearing = self._hearing(run, records, now)
        known = memory.confirmed.unclear
        signals = Signals(reports, memory.warnings, known, self.client.patience, hearing, memory.settling)
        request = request_of(run.annotations, run.status, records)
        attempts = observe(run.meta.uid, records, children, signals, now, request.counted_from)
        memory.settling = {key: memory.settling.get(key, now) for key, item in attempts.items() if item.settling}
        memory.records = {key: attempt.record for key, attempt in attempts.items()}
        self.node_failures.note(run.meta.uid, memory.records, now, (pod.node for pod in children.pods))
        artifacts, lost = self._checks.artifacts(run, frozen, memory)
        self.record_events(run, [RunEvent(EventReason.ARTIFACT_LOST, text, warning=True) for text in lost])
        observed = Observed(
            attempts=tuple(
                replace(item.as_core_attempt(now), past=request.is_past(item.stage, item.record))
                for item in attempts.values()
            ),
            artifacts=artifacts,
            forgotten={} if request.is_new else forgotten_of(run.status),
            suspend=bool(run.spec.get("suspend")),
            cancel=bool(run.spec.get("cancel")),
            keep_going=run.spec.get("onFailure") == "continue",
        )
        return ReconcileContext(run, frozen, attempts, decide(frozen.plan, observed, now), now, request)

    def _hearing(self, run: RunView, records: Mapping[AttemptKey, AttemptStatus], now: float) -> Hearing:
        """Return what the silence of an attempt means now."""
        for key, record in records.items():
            if record.ended is None and record.last_report is not None:
                self.reports.expect((run.meta.uid, *key))
        expected = self.client.settings.progress_url is not None
        return Hearing(self.reports.since, self.reports.deaf(now), expected)

    async def _plan(self, run: RunView, memory: RunMemory) -> FrozenPlan | Rejection | None:
        """Return the run's plan: the one in memory, the stored one, or a new one; None while a first one is made.

        While an edit is planned or rejected, the previous plan remains in force, so that its attempts are still taken
        care of.
        """
        if memory.plan is None:
            memory.plan = await self._stored_plan(run)
        if memory.plan is not None and memory.plan.spec_digest == spec_digest(run):
            memory.rejection = None
            return memory.plan
        if memory.rejection is not None and memory.is_still_rejected(run, self.clock()):
            return memory.plan or memory.rejection
        planned = self.planner.outcome(run, memory.plan)
        if planned is not None:
            await self._accept(run, planned, memory)
        return memory.plan or planned

    async def _accept(self, run: RunView, planned: FrozenPlan | Rejection, memory: RunMemory) -> None:
        """Put a new plan into force, or note why there is none."""
        if isinstance(planned, FrozenPlan):
            # Stored before anything is created from it: after a restart the same plan gives the same digests.
            await self._store_plan(run, planned)
            memory.plan, memory.rejection = planned, None
        else:
            memory.rejection, memory.rejected_at = planned, self.clock()
        self.planner.forget(run.meta.uid)

    async def _store_plan(self, run: RunView, plan: FrozenPlan) -> None:
        # One that exists was stored before a restart: its name contains the plan's digest.
        with contextlib.suppress(AlreadyExists):
            await self.client.kube.create(CONFIG_MAPS, plan_config_map(run, plan))

    async def _stored_plan(self, run: RunView) -> FrozenPlan | None:
        """Read the plan that an earlier operator process stored. None if there is none."""
        if run.status.plan_digest is None:
            return None
        try:
            body = await self.client.kube.get(CONFIG_MAPS, run.meta.namespace, plan_name(run, run.status.plan_digest))
        except ObjectNotFound:
            return None
        return from_config_map(body, run)

    # -- acting --------------------------------------------------------------------------------------------------------

    async def _end(
        self, context: ReconcileContext, ending: Sequence[ObservedAttempt], lost: Sequence[PodView], memory: RunMemory
    ) -> float:
        """Persist why attempts end, then delete them; everything else is left to the next reconciliation."""
        attempts = {**context.attempts, **{attempt.key: attempt for attempt in ending}}
        memory.records = {key: attempt.record for key, attempt in attempts.items()}
        # The status comes first: exit codes and messages disappear with the pods. If it fails (409 included), nothing
        # has been deleted, and the next reconciliation sees the same pods.
        await self._save(replace(context, attempts=attempts), memory)
        for attempt in ending:
            await self._delete(attempt)
        for pod in lost:
            text = f"stage `{pod.stage}`: {loss_text(pod, self.client.patience)}; the pod is removed"
            self.record_events(context.run, [RunEvent(EventReason.NODE_LOST, text, warning=True)])
            await self.client.remove_lost(pod)
        # At once: the cache contains the deletions already, so the next reconciliation does not repeat them.
        return context.now

    async def _delete(self, attempt: ObservedAttempt) -> None:
        if attempt.deletion_reason:
            await self.client.delete(attempt)
        for pod in attempt.abandoned_pods:
            await self.client.end_pod(pod)

    def _look_up(self, context: ReconcileContext) -> float | None:
        """Request the lookups that the decision needs; return when to repeat them if the store is unavailable."""
        uid = context.run.meta.uid
        moments = [
            self.lookups.ask(context.frozen.storage, action.digest, lambda: self.enqueue(uid))
            for action in context.actions(LookUp)
        ]
        return earliest(*moments)

    def _is_planning(self, context: ReconcileContext) -> bool:
        return self.planner.is_planning(context.run.meta.uid)

    async def _start(self, context: ReconcileContext, memory: RunMemory) -> bool:
        """Create the attempts that are due; return whether anything was written."""
        starts: list[Start] = context.actions(Start)
        unblocked_at = memory.unblocked_at()
        # While an edit is planned, nothing is started that it may change.
        if (unblocked_at is not None and context.now < unblocked_at) or self._is_planning(context):
            return False
        memory.blocker = None
        created = False
        if starts:
            await self.client.claim(context.run)
        for action in starts:
            artifacts, avoided = artifacts_of(context.decision.stages), self._avoided(context, action)
            if self._checks.hold_up(Starting(context.run, context.frozen, action, artifacts, context.now), memory):
                continue
            blocker = await self.client.start(context.run, context.frozen, action, artifacts, context.now, avoided)
            if blocker is not None:
                memory.block(blocker, context.now)
            memory.avoided[action.stage] = tuple(as_text([node]) for node in avoided)
            if avoided and blocker is None:
                text = f"stage `{action.stage}`: attempt {action.number} avoids {as_text(avoided)}"
                self.record_events(context.run, [RunEvent(EventReason.NODES_AVOIDED, text)])
            created = created or blocker is None
        return created

    def _avoided(self, context: ReconcileContext, action: Start) -> tuple[AvoidedNode, ...]:
        """Return the nodes that a new attempt avoids. It may use any if no other was found to fit the one before."""
        before = context.attempts.get((action.stage, action.number - 1))
        exclude = before is None or NO_OTHER_NODE not in before.record.stopping
        return self.node_failures.avoided(context.now, exclude)

    async def _diagnose(self, context: ReconcileContext, memory: RunMemory) -> None:
        """Read the events of pods whose status does not show what they wait for."""
        if not memory.may_diagnose(context.now):
            return
        warnings = await self.client.diagnose(context.living(), context.now)
        if warnings or memory.warnings:
            memory.warnings, memory.diagnosed_at = warnings, context.now
            # Again, because the warnings are an input of the observation, which has been made.
            self.enqueue(context.run.meta.uid)

    async def _finalize(self, run: RunView) -> None:
        """Delete the JobSets of a run that is being deleted, as long as other clients' finalizers hold it.

        We have no finalizer of our own: the garbage collector deletes what the run owns, also after the operator itself
        is gone, as when a namespace is deleted. A new run at the same work waits for the old pods (`start`).
        """
        memory = self.memories.setdefault(run.meta.uid, RunMemory(first_seen=self.clock()))
        children = self.client.cache.of_run(run.meta.uid)
        attempts = observe(run.meta.uid, known_records(run, memory, self.clock()), children, Signals(), self.clock())
        for attempt in attempts.values():
            await self.client.delete(attempt)
        await self.client.remove_finalizer(run)

    def _forget(self, uid: str) -> None:
        self.memories.pop(uid, None)
        self.planner.forget(uid)
        self._left.forget(uid)
        self.reports.forget(uid)
        self._pointers.forget(uid)

    # -- reporting -----------------------------------------------------------------------------------------------------

    async def _reject(self, run: RunView, rejection: Rejection, memory: RunMemory) -> float | None:
        await self._write(run, rejected_status(rejection, run.status, self.clock()), memory)
        return memory.retry_rejected_at()

    async def _save(self, context: ReconcileContext, memory: RunMemory) -> float | None:
        """Write the status if it has changed; return when to write a change that can wait."""
        run = self.client.cache.runs.get(context.run.meta.uid, context.run)
        store = self.lookups.of(context.frozen.storage)
        inputs = StatusInputs(
            frozen=context.frozen,
            decision=context.decision,
            attempts=list(context.attempts.values()),
            previous=run.status,
            # An edit counts as observed only when it has been planned: a complete run would be at rest before.
            generation=run.status.observed_generation or 0 if self._is_planning(context) else run.generation,
            now=context.now,
            suspend=bool(run.spec.get("suspend")),
            rejection=memory.rejection,
            blocker=memory.blocker,
            store_error="" if store.unreadable else store.error,
            unheard=unheard(context),
            avoided=memory.avoided,
            request=context.request,
        )
        if inputs.unheard:
            self.record_events(run, [RunEvent(EventReason.UNHEARD, inputs.unheard, warning=True)])
        self.reports.forget(run.meta.uid, frozenset(attempt.key for attempt in context.living()))
        return await self._write(run, working_status(inputs), memory)

    async def _write(self, run: RunView, status: TrainingRunStatus, memory: RunMemory) -> float | None:
        status = status.model_copy(update={"installation": self.client.settings.installation})
        body = with_unknown(run.status_raw, as_json(status))
        patch = merge_patch(run.status_raw, body)
        if not patch:
            return None
        now = self.clock()
        pause = 0.0 if milestones(status) != milestones(run.status) else MERGE_SECONDS
        if not merge_patch(without_progress(run.status_raw), without_progress(body)):
            pause = FLUSH_SECONDS
        if now < memory.saved_at + pause:
            return memory.saved_at + pause
        before = run.status
        # Carries the run's UID and resource version. A merge patch replaces lists as a whole, so one computed from an
        # old status would undo what was written since; the API server answers 409 instead, and `worker` retries.
        await self.client.patch_status(run, patch)
        memory.saved_at = now
        # Ended attempts beyond the bounded history were dropped from the status: from here on they are only counted.
        memory.records = records_of(status) | {
            key: record for key, record in (memory.records or {}).items() if record.ended is None
        }
        self.record_events(run, events_between(before, status))
        self.observe_status(before, status)
        return None


# -- small pure functions ----------------------------------------------------------------------------------------------


def is_at_rest(run: RunView, children: Children) -> bool:
    """Return whether a run is complete and unchanged since: it then needs neither a plan nor an observation.

    `children`: its objects. Its last attempt may have succeeded before all of its pods have ended.
    """
    true_types = {item.type for item in run.status.conditions if item.status is ConditionStatus.TRUE}
    if not {ConditionType.ACCEPTED, ConditionType.COMPLETE} <= true_types:
        return False
    if run.status.observed_generation != run.generation or any(not pod.has_ended for pod in children.pods):
        return False
    return all(is_finished(item, children.pods_of(item.stage, item.number)) for item in children.jobsets)


def known_records(run: RunView, memory: RunMemory, now: float) -> dict[AttemptKey, AttemptStatus]:
    """Return the records of a run's attempts.

    The status is read once. From then on memory is ahead of it: it holds ends that are not written yet.
    """
    if memory.records is None:
        memory.records = without_future(records_of(run.status), now)
    return memory.records


def status_deferred_until(context: ReconcileContext, memory: RunMemory) -> float | None:
    """Return the time until which the status update is deferred, for lookups or so that pods can start.

    None to write it now. Problems, and the first status after an edit, are never deferred for pods.
    """
    for_lookups = memory.defer_for_lookups(bool(context.actions(LookUp)), context.now)
    if for_lookups is not None:
        return for_lookups
    reasons = {attempt.waiting.reason for attempt in context.living() if attempt.waiting is not None}
    is_starting = reasons == {Reason.WAITING_FOR_PODS} and memory.blocker is None
    is_accepted = context.run.status.observed_generation == context.run.generation
    return memory.defer_for_pods(context.now) if is_starting and is_accepted else None


def stopped(attempt: ObservedAttempt, stop: Stop) -> ObservedAttempt:
    """Return an attempt marked for stopping, with the reason and the cause its end is charged to."""
    record = attempt.record
    # The first reason is kept, after a restart of the operator as well: it is what began the end.
    if not record.stopping:
        changes = {"stopping": stop.reason[:512], "stop_cause": stop.cause}
        record = record.model_copy(update={**changes, "fault": stop.fault[:FAULT_CHARACTERS] or record.fault})
    return replace(attempt, record=record, state=AttemptState.STOPPING, deletion_reason=stop.reason)


def recheck_times(attempt: ObservedAttempt, now: float) -> list[float]:
    """Return the times at which a live attempt must be observed again although nothing may have happened."""
    moments = [] if attempt.look_again_at is None else [attempt.look_again_at]
    jobset = attempt.jobset
    if jobset is not None and attempt.waiting is not None and not jobset.suspended:
        # The events of its pods, or of its Job if there are no pods, are read once they are stuck, and then repeatedly.
        first = waiting_since(attempt.record, now) + STUCK_SECONDS + 1.0
        moments.append(first if first > now else now + DIAGNOSE_SECONDS)
    return moments


def unheard(context: ReconcileContext) -> str:
    """Return why the silence of a running attempt is not taken for a hang. Empty if none is silent, or it is."""
    silent = [item for item in context.living() if item.state is AttemptState.RUNNING and item.has_reported]
    return next((item.hearing.deaf for item in silent if item.hearing.deaf), "")


def earliest(*moments: float | None) -> float | None:
    """Return the earliest of the moments that are not None."""
    return min((moment for moment in moments if moment is not None), default=None)
