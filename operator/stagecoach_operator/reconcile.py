"""One turn of one run: look, decide, act, tell. Level-triggered: everything follows from what is seen now.

The order of the writes is what makes a kill between any two of them harmless: what ends an attempt is written down
before its pods are deleted, and an attempt is made, under a name that follows from its number, before it is told of.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stagecoach_api import names
from stagecoach_api.artifacts import artifact_uri
from stagecoach_api.status import AttemptStatus, ConditionStatus, ConditionType, Reason, TrainingRunStatus
from stagecoach_core.decide import decide
from stagecoach_core.resolve import artifacts_of
from stagecoach_core.values import (
    AttemptState,
    Decision,
    Found,
    LookUp,
    Missing,
    Observed,
    RunState,
    Start,
    Stop,
)
from stagecoach_operator.artifact_lookup import Lookups
from stagecoach_operator.artifact_pointers import Pointers
from stagecoach_operator.cluster import Cluster
from stagecoach_operator.events import RunEvent, events_between
from stagecoach_operator.history import forgotten_of, records_of
from stagecoach_operator.kube import CONFIG_MAPS, NotFound
from stagecoach_operator.observe import AttemptKey, Sight, Surroundings, observe
from stagecoach_operator.planning import (
    RETRY_SECONDS,
    Refusal,
    Snapshot,
    from_config_map,
    plan_config_map,
    plan_name,
    plan_run,
    spec_digest,
)
from stagecoach_operator.progress_reports import Board
from stagecoach_operator.status import (
    Scene,
    Trouble,
    as_json,
    merge_patch,
    milestones,
    refused_status,
    without_progress,
    working_status,
)
from stagecoach_operator.waiting import STUCK_SECONDS
from stagecoach_operator.watched import RunView, timestamp

log = logging.getLogger(__name__)

MERGE_SECONDS = 1.0
"""How long small changes, such as pods that begin to run, wait to be written together."""
FLUSH_SECONDS = 10.0
"""How often progress alone is written to the status."""
DIAGNOSE_SECONDS = 10.0
"""How often the events of a stuck pod are read."""
ANSWER_SECONDS = 1.0
"""How long a status is held back for an answer of the store: mostly it is there at once, and saves a write."""
PODS_SECONDS = 2.0
"""How long a status is held back for the pods of attempts that were just made: mostly they run soon, and that saves a
write. What ended before is in S3 and in its pods meanwhile."""
TROUBLE_SECONDS = 15.0
"""How soon what the cluster refused is tried again."""


@dataclass
class RunMemory:
    """What is kept of a run between two turns. All of it can be had again from the cluster and S3."""

    begun: float
    """When its first turn was, in seconds since the epoch."""
    plan: Snapshot | None = None
    """The newest that was accepted. None: none was, or it has not been read yet."""
    refusal: Refusal | None = None
    """Why the spec as it stands is not accepted. None: it is."""
    refused_at: float = 0.0
    records: dict[AttemptKey, AttemptStatus] | None = None
    """None: the status has not been read yet."""
    troubles: dict[str, str] = field(default_factory=dict)
    diagnosed_at: float = 0.0
    trouble: Trouble | None = None
    trouble_at: float = 0.0
    saved_at: float = 0.0
    asking_since: float | None = None
    """Since when answers of the store are awaited. None: none are."""
    made_at: float = 0.0
    """When attempts were last made."""


@dataclass(frozen=True)
class Look:
    """A run as it is seen now, and what is to be done about it."""

    run: RunView
    snapshot: Snapshot
    sights: Mapping[AttemptKey, Sight]
    decision: Decision
    now: float

    def actions(self, kind: type[Any]) -> list[Any]:
        return [action for action in self.decision.actions if isinstance(action, kind)]

    def living(self) -> list[Sight]:
        return [sight for sight in self.sights.values() if sight.state is not AttemptState.ENDED]

    def doomed(self) -> list[Sight]:
        """Return the attempts whose objects must go, marked with the reason: those that failed, and those to stop."""
        stops = {(stop.stage, stop.number): stop for stop in self.actions(Stop)}
        marked = [stopped(sight, stops[key]) if key in stops else sight for key, sight in self.sights.items()]
        return [sight for sight in marked if sight.doomed and sight.jobset is not None]


@dataclass
class Reconciler:
    """Works on runs, one turn at a time; the turns of one run never overlap."""

    cluster: Cluster
    lookups: Lookups
    board: Board
    wake: Callable[[str], None]
    """Asks for another turn of the run with this UID."""
    announce: Callable[[RunView, Sequence[RunEvent]], None]
    """Posts events, some time."""
    clock: Callable[[], float] = time.time
    memories: dict[str, RunMemory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pointers = Pointers(self.lookups)

    async def reconcile(self, uid: str) -> float | None:
        """Do one turn; return when to look again if nothing happens, in seconds since the epoch.

        Raises Conflict where the run has changed meanwhile, and Unavailable; the next turn begins anew.
        """
        run = self.cluster.cache.runs.get(uid)
        if run is None:
            self._forget(uid)
            return None
        if run.meta.deleting:
            return await self._wind_down(run)
        if is_at_rest(run):
            return None
        memory = self.memories.setdefault(uid, RunMemory(begun=self.clock()))
        plan = await self._plan(run, memory)
        if isinstance(plan, Refusal):
            return await self._refuse(run, plan, memory)
        return await self._turn(run, plan, memory)

    async def _turn(self, run: RunView, plan: Snapshot, memory: RunMemory) -> float | None:
        """Look, decide, act, tell."""
        look = self._look(run, plan, memory)
        doomed = look.doomed()
        if doomed:
            return await self._end(look, doomed, memory)
        ask_again_at = self._ask(look)
        if await self._start(look, memory):
            memory.made_at = self.clock()
            look = self._look(self.cluster.cache.runs.get(run.meta.uid, run), plan, memory)
        await self._diagnose(look, memory)
        tell_at = answers_awaited_until(look, memory) or pods_awaited_until(look, memory)
        if tell_at is not None:
            return tell_at
        flush_at = await self._save(look, memory)
        self._pointers.point(look.run, look.snapshot, look.decision.stages, look.now)
        await self._release(look)
        return soonest(
            look.decision.look_again_at,
            ask_again_at,
            flush_at,
            memory.trouble_at + TROUBLE_SECONDS if memory.trouble is not None else None,
            ask_refused_again_at(memory),
            *(moment for sight in look.living() for moment in moments_of(sight, look.now)),
        )

    # -- looking -------------------------------------------------------------------------------------------------------

    def _look(self, run: RunView, snapshot: Snapshot, memory: RunMemory) -> Look:
        now = self.clock()
        if memory.records is None:
            memory.records = records_of(run.status)
        heard = {key: heard for key in memory.records if (heard := self.board.of((run.meta.uid, *key))) is not None}
        children = self.cluster.cache.of_run(run.meta.uid)
        sights = observe(run.meta.uid, memory.records, children, Surroundings(heard, memory.troubles), now)
        memory.records = {key: sight.record for key, sight in sights.items()}
        answers = recent(self.lookups.of(snapshot.storage).by_digest, memory.begun)
        observed = Observed(
            attempts=tuple(sight.as_attempt(now) for sight in sights.values()),
            artifacts=known_artifacts(run.status, sights, snapshot, answers),
            forgotten=forgotten_of(run.status),
            since=asked_at(run),
            suspend=bool(run.spec.get("suspend")),
            cancel=bool(run.spec.get("cancel")),
        )
        return Look(run, snapshot, sights, decide(snapshot.plan, observed, now), now)

    async def _plan(self, run: RunView, memory: RunMemory) -> Snapshot | Refusal:
        """Return the run's plan: the one in hand, the one that is kept, or a new one. While an edit is refused, the
        plan before it stands: what runs is looked after, and nothing of it is lost."""
        if memory.plan is None:
            memory.plan = await self._kept_plan(run)
        if memory.plan is not None and memory.plan.spec_digest == spec_digest(run):
            memory.refusal = None
            return memory.plan
        if memory.refusal is not None and is_still_refused(run, memory, self.clock()):
            return memory.plan or memory.refusal
        made = await self._plan_anew(run, memory)
        return memory.plan or made

    async def _plan_anew(self, run: RunView, memory: RunMemory) -> Snapshot | Refusal:
        settings, before = self.cluster.settings, memory.plan
        made = await self.lookups.in_thread(lambda: plan_run(run, settings, before))
        if isinstance(made, Snapshot):
            await self.cluster.kube.apply(CONFIG_MAPS, plan_config_map(run, made))
            memory.plan, memory.refusal = made, None
        else:
            memory.refusal, memory.refused_at = made, self.clock()
        return made

    async def _kept_plan(self, run: RunView) -> Snapshot | None:
        """Read the plan that an earlier operator kept. None: there was none."""
        if run.status.plan_digest is None:
            return None
        try:
            body = await self.cluster.kube.get(CONFIG_MAPS, run.meta.namespace, plan_name(run))
        except NotFound:
            return None
        return from_config_map(body, run)

    # -- acting --------------------------------------------------------------------------------------------------------

    async def _end(self, look: Look, doomed: Sequence[Sight], memory: RunMemory) -> float:
        """Write down why attempts end, then delete them; everything else waits for the next turn."""
        marked = {**look.sights, **{sight.key: sight for sight in doomed}}
        memory.records = {key: sight.record for key, sight in marked.items()}
        await self._save(replace(look, sights=marked), memory)
        for sight in doomed:
            await self.cluster.delete(sight)
        return look.now

    def _ask(self, look: Look) -> float | None:
        """Ask the store what only it knows."""
        uid = look.run.meta.uid
        moments = [
            self.lookups.ask(look.snapshot.storage, action.digest, lambda: self.wake(uid))
            for action in look.actions(LookUp)
        ]
        return soonest(*moments)

    async def _start(self, look: Look, memory: RunMemory) -> bool:
        """Make the attempts that are due; return whether any was made."""
        starts: list[Start] = look.actions(Start)
        if memory.trouble is not None and look.now < memory.trouble_at + TROUBLE_SECONDS:
            return False
        memory.trouble = None
        run = look.run
        made = False
        for action in starts:
            if names.FINALIZER not in run.finalizers:
                run = await self.cluster.hold(run)
            artifacts = artifacts_of(look.decision.stages)
            trouble = await self.cluster.start(run, look.snapshot, action, artifacts)
            if trouble is not None:
                memory.trouble, memory.trouble_at = trouble, look.now
            made = made or trouble is None
        return made or run is not look.run

    async def _diagnose(self, look: Look, memory: RunMemory) -> None:
        """Read the events of pods that wait without saying why."""
        if look.now < memory.diagnosed_at + DIAGNOSE_SECONDS:
            return
        troubles = await self.cluster.diagnose(look.living(), look.now)
        if troubles or memory.troubles:
            memory.troubles, memory.diagnosed_at = troubles, look.now
            self.wake(look.run.meta.uid)

    async def _release(self, look: Look) -> None:
        """Let go of a run of which nothing lives, and nothing will without somebody's doing."""
        run = self.cluster.cache.runs.get(look.run.meta.uid)
        if run is not None and look.decision.state is not RunState.PROGRESSING and not look.living():
            await self.cluster.release(run)

    async def _wind_down(self, run: RunView) -> float | None:
        """Delete what a run that is being deleted has left, pods first; then let it go."""
        memory = self.memories.setdefault(run.meta.uid, RunMemory(begun=self.clock()))
        records = records_of(run.status) if memory.records is None else memory.records
        children = self.cluster.cache.of_run(run.meta.uid)
        sights = observe(run.meta.uid, records, children, Surroundings(), self.clock())
        standing = [sight for sight in sights.values() if sight.jobset is not None]
        for sight in standing:
            await self.cluster.delete(sight)
        if not standing:
            await self.cluster.release(run)
        return None

    def _forget(self, uid: str) -> None:
        self.memories.pop(uid, None)
        self.board.forget(uid)
        self._pointers.forget(uid)

    # -- telling -------------------------------------------------------------------------------------------------------

    async def _refuse(self, run: RunView, refusal: Refusal, memory: RunMemory) -> float | None:
        await self._write(run, refused_status(refusal, run.status, self.clock()), memory)
        return ask_refused_again_at(memory)

    async def _save(self, look: Look, memory: RunMemory) -> float | None:
        """Write the status if there is news; return when to write news that can wait."""
        run = self.cluster.cache.runs.get(look.run.meta.uid, look.run)
        answers = self.lookups.of(look.snapshot.storage)
        scene = Scene(
            snapshot=look.snapshot,
            decision=look.decision,
            sights=list(look.sights.values()),
            previous=run.status,
            generation=run.generation,
            now=look.now,
            suspend=bool(run.spec.get("suspend")),
            refusal=memory.refusal,
            trouble=memory.trouble,
            store_trouble="" if answers.unreadable else answers.trouble,
        )
        self.board.forget(run.meta.uid, frozenset(sight.key for sight in look.living()))
        return await self._write(run, working_status(scene), memory)

    async def _write(self, run: RunView, status: TrainingRunStatus, memory: RunMemory) -> float | None:
        body = as_json(status)
        patch = merge_patch(run.status_raw, body)
        if not patch:
            return None
        now = self.clock()
        patience = 0.0 if milestones(status) != milestones(run.status) else MERGE_SECONDS
        if not merge_patch(without_progress(run.status_raw), without_progress(body)):
            patience = FLUSH_SECONDS
        if now < memory.saved_at + patience:
            return memory.saved_at + patience
        before = run.status
        await self.cluster.patch_status(run, patch)
        memory.saved_at = now
        memory.records = records_of(status) | {
            key: record for key, record in (memory.records or {}).items() if record.ended is None
        }
        self.announce(run, events_between(before, status))
        return None


# -- small pure things -------------------------------------------------------------------------------------------------


def is_at_rest(run: RunView) -> bool:
    """Tell whether a run is complete and nothing about it has changed since: it needs neither plan nor look."""
    holds = {item.type for item in run.status.conditions if item.status is ConditionStatus.TRUE}
    complete = {ConditionType.ACCEPTED, ConditionType.COMPLETE} <= holds
    return complete and run.status.observed_generation == run.generation and names.FINALIZER not in run.finalizers


def is_still_refused(run: RunView, memory: RunMemory, now: float) -> bool:
    """Tell whether the spec as it stands has been refused, and it is too early to try again."""
    if memory.refusal is None or memory.refusal.generation != run.generation:
        return False
    again_at = ask_refused_again_at(memory)
    return again_at is None or now < again_at


def ask_refused_again_at(memory: RunMemory) -> float | None:
    """Return when a spec is looked at again that was refused for something outside of it. None: not by itself."""
    retries = memory.refusal is not None and memory.refusal.retry
    return memory.refused_at + RETRY_SECONDS if retries else None


def answers_awaited_until(look: Look, memory: RunMemory) -> float | None:
    """Return until when the status is held back. None: it is told now."""
    if not look.actions(LookUp):
        memory.asking_since = None
        return None
    if memory.asking_since is None:
        memory.asking_since = look.now
    until = memory.asking_since + ANSWER_SECONDS
    return until if look.now < until else None


def pods_awaited_until(look: Look, memory: RunMemory) -> float | None:
    """Return until when the status is held back for pods to run. None: it is told now, as is all that is amiss."""
    until = memory.made_at + PODS_SECONDS
    waits = [sight.waiting.reason for sight in look.living() if sight.waiting is not None]
    soon = bool(waits) and all(reason is Reason.WAITING_FOR_PODS for reason in waits) and memory.trouble is None
    accepted = look.run.status.observed_generation == look.run.generation
    return until if soon and accepted and look.now < until else None


def asked_at(run: RunView) -> float:
    """Return when the user asked for the run, or for one more try."""
    try:
        again = timestamp(run.annotations.get(names.ANNOTATION_RETRY))
    except ValueError:
        again = None
    return max(run.meta.created, again or 0.0)


def recent(answers: Mapping[str, Found | Missing], begun: float) -> dict[str, Found | Missing]:
    """Return the answers of the store that count for a run: what was missing before it began may have been made since,
    by another run."""
    return {digest: answer for digest, answer in answers.items() if isinstance(answer, Found) or answer.at >= begun}


def known_artifacts(
    status: TrainingRunStatus,
    sights: Mapping[AttemptKey, Sight],
    snapshot: Snapshot,
    answers: Mapping[str, Found | Missing],
) -> dict[str, Found | Missing]:
    """Return what is known of artifacts: from the status, from the store, and from pods that say they are done."""
    known: dict[str, Found | Missing] = dict(answers)
    for stage in status.stages:
        artifact = stage.artifact
        if artifact is not None:
            known[artifact.stage_digest] = Found(artifact.stage_digest, artifact.content_digest, artifact.uri)
    for sight in sights.values():
        record = sight.record
        if record.ended is not None and record.cause is None and record.content_digest is not None:
            uri = artifact_uri(snapshot.storage_uri, record.digest)
            known[record.digest] = Found(record.digest, record.content_digest, uri)
    return known


def stopped(sight: Sight, stop: Stop) -> Sight:
    """Return an attempt marked as asked to stop: the reason, and what its end is charged to."""
    record = sight.record
    if not record.stopping:
        record = record.model_copy(update={"stopping": stop.reason[:512], "stop_cause": stop.cause})
    return replace(sight, record=record, state=AttemptState.STOPPING, doomed=stop.reason)


def moments_of(sight: Sight, now: float) -> list[float]:
    """Return when time alone changes what is seen of a living attempt."""
    moments = [] if sight.look_again_at is None else [sight.look_again_at]
    waits = sight.jobset is not None and sight.waiting is not None and not sight.jobset.suspended
    if waits and sight.jobset is not None:
        # Its pods, or their absence, are asked about once they are stuck, and again and again while they are.
        first = sight.jobset.meta.created + STUCK_SECONDS + 1.0
        moments.append(first if first > now else now + DIAGNOSE_SECONDS)
    return moments


def soonest(*moments: float | None) -> float | None:
    """Return the earliest of the moments that are given."""
    return min((moment for moment in moments if moment is not None), default=None)
