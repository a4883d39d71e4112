"""Combine watched objects and the persisted status into the attempts the core decides on. Pure.

An attempt is known by its JobSet, by its record in the run's status, or by both. The record is what remains of it once
its objects are gone; as long as they exist, they take precedence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from stagecoach_api.faults import shortened
from stagecoach_api.outcomes import AttemptResult, Cause
from stagecoach_api.status import AttemptStatus, Incarnation
from stagecoach_core.policies.ending import end_of_attempt
from stagecoach_core.values import Attempt, AttemptState
from stagecoach_operator.object_cache import Children
from stagecoach_operator.object_views import JobSetView, PodView, WorkloadView
from stagecoach_operator.pod_startup import Waiting, waiting_for
from stagecoach_operator.progress_reports import LatestReport
from stagecoach_operator.termination import AttemptOutcome, TerminationReport, newest_step, outcome_of, warnings_of

AttemptKey = tuple[str, int]
"""Stage and number."""

MAX_INCARNATIONS = 4
MESSAGE_CHARACTERS = 1024
LOST = "its JobSet does not exist: it was deleted by another client, or its creation failed"


@dataclass(frozen=True)
class ObservedAttempt:
    """One attempt as observed now."""

    stage: str
    record: AttemptStatus
    """Its record, updated with what its objects report."""
    state: AttemptState
    jobset: JobSetView | None = None
    """None if it does not exist any more."""
    pods: tuple[PodView, ...] = ()
    workload: WorkloadView | None = None
    waiting: Waiting | None = None
    """Why it is not running yet. None if it is running or has ended."""
    deletion_reason: str = ""
    """Why its remaining objects must be deleted. Empty: they need not be."""
    latest_report: LatestReport | None = None
    look_again_at: float | None = None

    @property
    def key(self) -> AttemptKey:
        return self.stage, self.record.number

    def as_core_attempt(self, now: float) -> Attempt:
        """Return it in the core's terms.

        An attempt that has never reported progress is indistinguishable from one that hangs, so its heartbeat is
        always now: without a progress server no attempt is restarted for silence.
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
            heartbeat=now if self.latest_report is None else max(self.latest_report.report.time, self._pods_started()),
            longest_silence=0.0 if self.latest_report is None else self.latest_report.longest_silence,
            fault=record.fault,
            last_step=record.last_step,
        )

    def _pods_started(self) -> float:
        """Return when the newest pod started. After a preemption by Kueue that may be hours after the last report."""
        return max((pod.running_since or 0.0 for pod in self.pods), default=0.0)


@dataclass(frozen=True)
class Signals:
    """What is known about attempts in addition to their objects."""

    reports: Mapping[AttemptKey, LatestReport] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)
    """Newest warning event of stuck pods, and of JobSets without pods, by UID."""


def observe(
    run_uid: str,
    records: Mapping[AttemptKey, AttemptStatus],
    children: Children,
    signals: Signals,
    now: float,
    since: float = 0.0,
) -> dict[AttemptKey, ObservedAttempt]:
    """Return every known attempt, by stage and number.

    `now`, `since`: the present, and when the user requested this run or a retry of it, in seconds since the epoch.
    """
    # Labels can be copied; only the controller reference proves that a JobSet is this run's.
    jobsets = {(item.stage, item.number): item for item in children.jobsets if item.owner_uid == run_uid}
    attempts: dict[AttemptKey, ObservedAttempt] = {}
    # The union: a JobSet without a record was created just before a kill; a record without a JobSet has lost it.
    for key in sorted({*records, *jobsets}):
        record = records.get(key) or _record_of(jobsets[key])
        earlier = [item.as_core_attempt(now) for item in attempts.values() if _precedes(item, key[0], record, since)]
        attempts[key] = observe_attempt(key[0], record, jobsets.get(key), children, signals, now, earlier)
    return attempts


def _precedes(attempt: ObservedAttempt, stage: str, record: AttemptStatus, since: float) -> bool:
    """Return whether an attempt ended at the same work, since the user requested it."""
    before = attempt.record
    alike = (attempt.stage, before.digest) == (stage, record.digest)
    return alike and before.ended is not None and before.ended.timestamp() >= since


def _record_of(jobset: JobSetView) -> AttemptStatus:
    """Return the record of an attempt that was created, but not recorded: the operator was killed in between."""
    return AttemptStatus(
        number=jobset.number, digest=jobset.digest, name=jobset.meta.name, started=moment(jobset.meta.created)
    )


def observe_attempt(
    stage: str,
    record: AttemptStatus,
    jobset: JobSetView | None,
    children: Children,
    signals: Signals,
    now: float,
    earlier: Sequence[Attempt] = (),
) -> ObservedAttempt:
    """Return one attempt as observed now. `earlier`: see `end_of_attempt`."""
    if record.ended is not None:
        # The JobSet of a successful attempt is kept for its logs; that of a failed one is deleted.
        leftover = "" if jobset is None or record.cause is None else "the attempt has ended"
        return ObservedAttempt(
            stage, record, AttemptState.ENDED, jobset, deletion_reason=_unless_deleting(jobset, leftover)
        )
    pods = children.pods_of(stage, record.number)
    if jobset is None:
        return ObservedAttempt(stage, ended(record, now, earlier), AttemptState.ENDED)
    outcome = outcome_of(pods, jobset, now)
    record = _updated(record, outcome.report, pods)
    # Success takes precedence over a pending stop or deletion: the artifact is published.
    if outcome.report is not None and outcome.report.result.cause is None:
        return ObservedAttempt(stage, ended(record, now, earlier), AttemptState.ENDED, jobset, pods)
    # A failed attempt is stopping, not ended, until its JobSet is gone: the next must not run together with its pods.
    reason = record.stopping or (f"it failed: {record.message}" if record.cause is not None else "")
    if jobset.meta.deleting or reason:
        return ObservedAttempt(
            stage,
            record,
            AttemptState.STOPPING,
            jobset,
            pods,
            deletion_reason=_unless_deleting(jobset, reason),
            latest_report=signals.reports.get((stage, record.number)),
        )
    return _live_attempt(stage, record, jobset, pods, children, signals, outcome, now)


def _live_attempt(
    stage: str,
    record: AttemptStatus,
    jobset: JobSetView,
    pods: tuple[PodView, ...],
    children: Children,
    signals: Signals,
    outcome: AttemptOutcome,
    now: float,
) -> ObservedAttempt:
    workload = children.workloads.get(jobset.meta.uid)
    waiting = waiting_for(jobset, pods, workload, signals.warnings)
    give_up_at = None if waiting is None else waiting.give_up_at
    deletion_reason = ""
    if waiting is not None and give_up_at is not None and now >= give_up_at:
        deletion_reason = waiting.message
        # Uncharged: the attempt has not run, and a missing Secret or image is not a failure of its code.
        record = record.model_copy(update={"stopping": deletion_reason[:512], "stop_cause": Cause.PREEMPTION})
    moments = [item for item in (outcome.look_again_at, give_up_at) if item is not None and item > now]
    running = waiting is None
    # Set once: after a preemption, the pods that Kueue re-creates continue the same attempt.
    if running and record.running_since is None:
        started = max((pod.running_since or 0.0 for pod in pods), default=0.0)
        record = record.model_copy(update={"running_since": moment(started or now)})
    return ObservedAttempt(
        stage,
        record,
        AttemptState.STOPPING if deletion_reason else AttemptState.RUNNING if running else AttemptState.STARTING,
        jobset,
        pods,
        workload,
        waiting,
        deletion_reason,
        signals.reports.get((stage, record.number)),
        min(moments, default=None),
    )


def _unless_deleting(jobset: JobSetView | None, reason: str) -> str:
    return "" if jobset is None or jobset.meta.deleting else reason


# -- records -----------------------------------------------------------------------------------------------------------


def _updated(record: AttemptStatus, report: TerminationReport | None, pods: tuple[PodView, ...]) -> AttemptStatus:
    """Return the record with what the pods report.

    The first explanation of a failure is kept: later ones, of the other pods, are its consequences.
    """
    told = warnings_of(pods) or record.warnings
    record = record.model_copy(update={"incarnations": _incarnations(record, pods), "warnings": told})
    if report is None:
        return record
    result = report.result
    # The step may still advance: what counts is the newest complete checkpoint of any rank.
    if record.exit_code is not None and result.cause is not None:
        return record.model_copy(update={"last_step": newest_step((record.last_step, result.last_step))})
    return record.model_copy(
        update={
            "cause": result.cause,
            "content_digest": result.content_digest,
            "exit_code": result.exit_code,
            "last_step": result.last_step,
            "pod": report.pod,
            "node": report.node,
            "message": result.message,
            "fault": result.fault or "",
        }
    )


def _incarnations(record: AttemptStatus, pods: tuple[PodView, ...]) -> tuple[Incarnation, ...]:
    """Return the pods with index 0 that the attempt has had: Kueue re-creates them after a preemption."""
    known = {item.pod_uid: item for item in record.incarnations}
    # By UID: after a resume by Kueue, the Job is the same and JobSet's restart-attempt label is still 0. Reversed,
    # since `pods_of` returns the newest first, and the oldest incarnations are the ones to drop.
    for pod in reversed([pod for pod in pods if pod.index == 0]):
        before = known.get(pod.meta.uid)
        started = None if before is None else before.started
        if pod.running_since is not None:
            started = moment(pod.running_since)
        known[pod.meta.uid] = Incarnation(pod_uid=pod.meta.uid, pod=pod.meta.name, node=pod.node, started=started)
    return tuple(known.values())[-MAX_INCARNATIONS:]


def ended(record: AttemptStatus, now: float, earlier: Sequence[Attempt] = ()) -> AttemptStatus:
    """Return the record of an attempt that has ended: its objects do not exist any more, or its result is known.

    `earlier`: see `end_of_attempt`.
    """
    # Without an exit code there is no result: a record whose `cause` is None must then not count as a success.
    result = None if record.exit_code is None else _result_of(record)
    end = end_of_attempt(record.stop_cause, result, earlier, record.number)
    message = end.message if result is not None else record.message
    if end.cause is not None and record.stop_cause is not None and end.cause is record.stop_cause:
        message = "; ".join(part for part in (record.stopping, record.message) if part)
    elif end.cause is not None and not message:
        message = LOST
    return record.model_copy(
        update={"ended": moment(now), "cause": end.cause, "message": shortened(message, MESSAGE_CHARACTERS)}
    )


def _result_of(record: AttemptStatus) -> AttemptResult:
    return AttemptResult(
        exit_code=record.exit_code or 0,
        cause=record.cause,
        message=record.message,
        last_step=record.last_step,
        fault=record.fault or None,
    )


def moment(seconds: float) -> datetime:
    """Return seconds since the epoch as a time, to the millisecond."""
    return datetime.fromtimestamp(round(seconds, 3), UTC)
