"""From watched objects and the status to what the core decides on. Pure.

An attempt is known by its JobSet, by its record in the run's status, or by both. The record is what is left of it when
its objects are gone; while they are there, they have the last word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from stagecoach_api.outcomes import AttemptResult, Cause
from stagecoach_api.status import AttemptStatus, Incarnation
from stagecoach_core.policies.ending import cause_of_end
from stagecoach_core.values import Attempt, AttemptState
from stagecoach_operator.progress_reports import Heard
from stagecoach_operator.termination import Verdict, Word, newest_step, verdict_of
from stagecoach_operator.waiting import Waiting, waiting_for
from stagecoach_operator.watched import Children, JobSetView, PodView, WorkloadView

AttemptKey = tuple[str, int]
"""Stage and number."""

MAX_INCARNATIONS = 4
LOST = "its JobSet is gone: somebody deleted it, or it was never made"


@dataclass(frozen=True)
class Sight:
    """One attempt as it is seen now."""

    stage: str
    record: AttemptStatus
    """Brought up to date."""
    state: AttemptState
    jobset: JobSetView | None = None
    """None: it is gone."""
    pods: tuple[PodView, ...] = ()
    workload: WorkloadView | None = None
    waiting: Waiting | None = None
    """What it waits for; None: it runs, or has ended."""
    doomed: str = ""
    """Why what is left of it must be deleted. Empty: it need not."""
    heard: Heard | None = None
    look_again_at: float | None = None

    @property
    def key(self) -> AttemptKey:
        return self.stage, self.record.number

    def as_attempt(self, now: float) -> Attempt:
        """Return it as the core sees it.

        An attempt that has never reported cannot be told from one that hangs, so its silence counts for nothing: who
        runs without a progress server is not restarted for it.
        """
        record = self.record
        return Attempt(
            stage=self.stage,
            digest=record.digest,
            number=record.number,
            state=self.state,
            started=record.started.timestamp(),
            running_since=None if record.running_since is None else record.running_since.timestamp(),
            ended=None if record.ended is None else record.ended.timestamp(),
            cause=record.cause if self.state is AttemptState.ENDED else record.stop_cause,
            message=record.message if self.state is AttemptState.ENDED else record.stopping,
            heartbeat=now if self.heard is None else max(self.heard.report.time, self._began()),
            longest_silence=0.0 if self.heard is None else self.heard.longest_silence,
        )

    def _began(self) -> float:
        """Return when the newest of its pods began: a queue may have held the attempt back for hours."""
        return max((pod.running_since or 0.0 for pod in self.pods), default=0.0)


@dataclass(frozen=True)
class Surroundings:
    """What is known beside the watched objects."""

    heard: Mapping[AttemptKey, Heard] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)
    """What the events of stuck pods say, by the pods' UID."""


def observe(
    run_uid: str,
    records: Mapping[AttemptKey, AttemptStatus],
    children: Children,
    surroundings: Surroundings,
    now: float,
) -> dict[AttemptKey, Sight]:
    """Return every attempt that is known, by stage and number. `now`: seconds since the epoch."""
    jobsets = {(item.stage, item.number): item for item in children.jobsets if item.owner_uid == run_uid}
    found: dict[AttemptKey, Sight] = {}
    for key in sorted({*records, *jobsets}):
        record = records.get(key) or _record_of(jobsets[key])
        found[key] = sight_of(key[0], record, jobsets.get(key), children, surroundings, now)
    return found


def _record_of(jobset: JobSetView) -> AttemptStatus:
    """Return the record of an attempt that was made, but not written down."""
    return AttemptStatus(
        number=jobset.number, digest=jobset.digest, name=jobset.meta.name, started=moment(jobset.meta.created)
    )


def sight_of(
    stage: str,
    record: AttemptStatus,
    jobset: JobSetView | None,
    children: Children,
    surroundings: Surroundings,
    now: float,
) -> Sight:
    """Return one attempt as it is seen now."""
    if record.ended is not None:
        leftover = "" if jobset is None or record.cause is None else "the attempt has ended"
        return Sight(stage, record, AttemptState.ENDED, jobset, doomed=_if_standing(jobset, leftover))
    pods = children.pods_of(stage, record.number)
    if jobset is None:
        return Sight(stage, ended(record, now), AttemptState.ENDED)
    verdict = verdict_of(pods, jobset, now)
    record = _brought_up_to_date(record, verdict.word, pods)
    if verdict.word is not None and verdict.word.cause is None:
        return Sight(stage, ended(record, now), AttemptState.ENDED, jobset, pods)
    heard = surroundings.heard.get((stage, record.number))
    doomed = record.stopping or (f"it failed: {record.message}" if record.cause is not None else "")
    if jobset.meta.deleting or doomed:
        return Sight(
            stage, record, AttemptState.STOPPING, jobset, pods, doomed=_if_standing(jobset, doomed), heard=heard
        )
    return _living(stage, record, jobset, pods, children, surroundings, verdict, now)


def _living(
    stage: str,
    record: AttemptStatus,
    jobset: JobSetView,
    pods: tuple[PodView, ...],
    children: Children,
    surroundings: Surroundings,
    verdict: Verdict,
    now: float,
) -> Sight:
    workload = children.workloads.get(jobset.meta.uid)
    waiting = waiting_for(jobset, pods, workload, surroundings.troubles)
    give_up_at = None if waiting is None else waiting.give_up_at
    doomed = ""
    if waiting is not None and give_up_at is not None and now >= give_up_at:
        doomed = waiting.message
        record = record.model_copy(update={"stopping": doomed[:512], "stop_cause": Cause.PREEMPTION})
    moments = [item for item in (verdict.look_again_at, give_up_at) if item is not None and item > now]
    running = waiting is None
    if running and record.running_since is None:
        begun = max((pod.running_since or 0.0 for pod in pods), default=0.0)
        record = record.model_copy(update={"running_since": moment(begun or now)})
    return Sight(
        stage,
        record,
        AttemptState.STOPPING if doomed else AttemptState.RUNNING if running else AttemptState.STARTING,
        jobset,
        pods,
        workload,
        waiting,
        doomed,
        surroundings.heard.get((stage, record.number)),
        min(moments, default=None),
    )


def _if_standing(jobset: JobSetView | None, reason: str) -> str:
    return "" if jobset is None or jobset.meta.deleting else reason


# -- records -----------------------------------------------------------------------------------------------------------


def _brought_up_to_date(record: AttemptStatus, word: Word | None, pods: tuple[PodView, ...]) -> AttemptStatus:
    """Take over what the pods say. The first explanation of a failure stays: its siblings' only follow from it."""
    record = record.model_copy(update={"incarnations": _incarnations(record, pods)})
    if word is None:
        return record
    if record.exit_code is not None and word.cause is not None:
        return record.model_copy(update={"last_step": newest_step((record.last_step, word.last_step))})
    return record.model_copy(
        update={
            "cause": word.cause,
            "content_digest": word.content_digest,
            "exit_code": word.exit_code if word.exit_code is not None else int(word.cause is not None),
            "last_step": word.last_step,
            "pod": word.pod,
            "node": word.node,
            "message": word.message,
        }
    )


def _incarnations(record: AttemptStatus, pods: tuple[PodView, ...]) -> tuple[Incarnation, ...]:
    known = {item.pod_uid: item for item in record.incarnations}
    for pod in reversed([pod for pod in pods if pod.index == 0]):
        before = known.get(pod.meta.uid)
        started = None if before is None else before.started
        if pod.running_since is not None:
            started = moment(pod.running_since)
        known[pod.meta.uid] = Incarnation(pod_uid=pod.meta.uid, pod=pod.meta.name, node=pod.node, started=started)
    return tuple(known.values())[-MAX_INCARNATIONS:]


def ended(record: AttemptStatus, now: float) -> AttemptStatus:
    """Return the record of an attempt of which nothing is left, or whose result is there."""
    told = record.exit_code is not None
    result = AttemptResult(exit_code=record.exit_code or 0, cause=record.cause) if told else None
    cause = cause_of_end(record.stop_cause, result)
    message = record.message
    if cause is not None and record.stop_cause is not None and cause is record.stop_cause:
        message = "; ".join(part for part in (record.stopping, record.message) if part)
    elif cause is not None and not message:
        message = LOST
    return record.model_copy(update={"ended": moment(now), "cause": cause, "message": message[:1024]})


def moment(seconds: float) -> datetime:
    """Return seconds since the epoch as a time, to the millisecond."""
    return datetime.fromtimestamp(round(seconds, 3), UTC)
