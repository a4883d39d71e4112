"""Combine watched objects and the persisted status into the attempts the core decides on. Pure.

An attempt is known by its JobSet, by its record in the run's status, or by both. The record is what remains of it once
its objects are gone; as long as they exist, they take precedence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stagecoach_api.faults import shortened
from stagecoach_api.outcomes import AttemptResult, Cause
from stagecoach_api.status import AttemptStatus, Incarnation, Reason
from stagecoach_core.policies.ending import end_of_attempt
from stagecoach_core.values import Attempt, AttemptState
from stagecoach_operator.attempt_times import moment, wait_of, with_times
from stagecoach_operator.heartbeats import heartbeat_of, with_report
from stagecoach_operator.lost_nodes import DEFAULT_PATIENCE, Patience, is_ignored, is_lost, next_moment, with_loss
from stagecoach_operator.object_cache import Children
from stagecoach_operator.object_views import JobSetView, PodView, WorkloadView
from stagecoach_operator.pod_startup import Waiting, waiting_for
from stagecoach_operator.progress_reports import Hearing, LatestReport
from stagecoach_operator.releases import release_of
from stagecoach_operator.requests import AttemptKey
from stagecoach_operator.termination import (
    AttemptOutcome,
    TerminationReport,
    newest_step,
    outcome_of,
    success_of,
    warnings_of,
)

MAX_INCARNATIONS = 4
NOT_HEARD = Hearing()
UNCLEAR_SECONDS = 15.0
"""How often a JobSet is looked for of which it is unclear whether it exists."""
MESSAGE_CHARACTERS = 1024
LOST = "its JobSet does not exist: it was deleted by another client, or its creation failed"
ABANDONED = "its JobSet was deleted by another client before its pods had ended"


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
    abandoned_pods: tuple[PodView, ...] = ()
    """Pods that must be deleted one by one, because no JobSet of theirs is left to delete."""
    lost_pods: tuple[PodView, ...] = ()
    """Pods on lost nodes, whose objects must be removed without waiting for the node."""
    latest_report: LatestReport | None = None
    look_again_at: float | None = None
    hearing: Hearing = NOT_HEARD
    settling: bool = False
    """Whether a pod has failed, and the others' reports are awaited."""

    @property
    def key(self) -> AttemptKey:
        return self.stage, self.record.number

    @property
    def has_reported(self) -> bool:
        return self.latest_report is not None or self.record.last_report is not None

    def as_core_attempt(self, now: float) -> Attempt:
        """Return it in the core's terms."""
        record = self.record
        heartbeat = heartbeat_of(record, self.latest_report, self.hearing, now)
        return Attempt(
            stage=self.stage,
            digest=record.digest,
            number=record.number,
            state=self.state,
            started=record.started.timestamp(),
            running_since=None if record.running_since is None else record.running_since.timestamp(),
            ran_before=record.ran_seconds,
            ended=None if record.ended is None else record.ended.timestamp(),
            cause=record.cause if self.state is AttemptState.ENDED else record.stop_cause,
            message=record.message if self.state is AttemptState.ENDED else record.stopping,
            heartbeat=heartbeat.time,
            listening_since=heartbeat.listening_since,
            longest_silence=heartbeat.longest_silence,
            fault=record.fault,
            last_step=record.last_step,
            wait=None if self.waiting is None else wait_of(record, self.waiting, now),
        )


@dataclass(frozen=True)
class Signals:
    """What is known about attempts in addition to their objects."""

    reports: Mapping[AttemptKey, LatestReport] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)
    """Newest warning event of stuck pods, and of JobSets without pods, by UID."""
    unclear: Mapping[AttemptKey, str] = field(default_factory=dict)
    """Attempts whose JobSet is not known, and of which it is unclear whether it exists, with the reason."""
    patience: Patience = DEFAULT_PATIENCE
    hearing: Hearing = NOT_HEARD
    """What silence means. The default: nothing."""
    settling: Mapping[AttemptKey, float] = field(default_factory=dict)
    """When attempts were first seen with a failed pod, in seconds since the epoch."""


def observe(
    run_uid: str,
    records: Mapping[AttemptKey, AttemptStatus],
    children: Children,
    signals: Signals,
    now: float,
    counted_from: Mapping[str, int] | None = None,
) -> dict[AttemptKey, ObservedAttempt]:
    """Return every known attempt, by stage and number.

    `now`: seconds since the epoch. `counted_from`: see `Request`; attempts before it are not compared with later ones.
    """
    # Labels can be copied; only the controller reference proves that a JobSet is this run's.
    owned = {(item.stage, item.number, item.meta.name): item for item in children.jobsets if item.owner_uid == run_uid}
    # A copy under another name has the same labels and owner.
    jobsets = {
        (stage, number): item
        for (stage, number, name), item in owned.items()
        if (stage, number) not in records or records[stage, number].name == name
    }
    attempts: dict[AttemptKey, ObservedAttempt] = {}
    # The union: a JobSet without a record was created just before a kill; a record without a JobSet has lost it.
    for key in sorted({*records, *jobsets}):
        record = records.get(key) or _record_of(jobsets[key])
        first = (counted_from or {}).get(key[0], 0)
        earlier = [item.as_core_attempt(now) for item in attempts.values() if _precedes(item, key[0], record, first)]
        attempts[key] = observe_attempt(key[0], record, jobsets.get(key), children, signals, now, earlier)
    return attempts


def _precedes(attempt: ObservedAttempt, stage: str, record: AttemptStatus, first: int) -> bool:
    """Return whether an attempt ended at the same work, since the user requested it."""
    before = attempt.record
    alike = (attempt.stage, before.digest) == (stage, record.digest)
    return alike and before.ended is not None and before.number >= first


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
    pods = children.pods_of(stage, record.number)
    if record.ended is not None:
        return _ended_attempt(stage, record, jobset, pods, signals.patience, now)
    if jobset is None:
        return _without_jobset(stage, record, pods, signals, now, earlier)
    outcome = outcome_of(pods, jobset, now, signals.settling.get((stage, record.number)))
    record = _updated(record, outcome.report, pods)
    # Success takes precedence over a pending stop or deletion: the artifact is published.
    if outcome.report is not None and outcome.report.result.cause is None:
        return _ended_attempt(stage, ended(record, now, earlier), jobset, pods, signals.patience, now)
    lost = tuple(pod for pod in pods if is_lost(pod, now, signals.patience))
    record = with_loss(record, lost, signals.patience)
    # A failed attempt is stopping, not ended, until its JobSet is gone: the next must not run together with its pods.
    reason = record.stopping or (f"it failed: {record.message}" if record.cause is not None else "")
    if not (jobset.meta.deleting or reason):
        return _live_attempt(stage, record, jobset, pods, children, signals, outcome, now)
    if _is_stuck(jobset, pods, signals.patience, now):
        return ObservedAttempt(stage, ended(record, now, earlier), AttemptState.ENDED, jobset, pods, lost_pods=lost)
    return ObservedAttempt(
        stage,
        record,
        AttemptState.STOPPING,
        jobset,
        pods,
        deletion_reason=_unless_deleting(jobset, reason),
        lost_pods=lost,
        latest_report=signals.reports.get((stage, record.number)),
        look_again_at=next_moment(pods, now, signals.patience),
    )


def _is_stuck(jobset: JobSetView, pods: Sequence[PodView], patience: Patience, now: float) -> bool:
    """Return whether a JobSet stays although it is being deleted and nothing that runs holds it.

    A finalizer of another controller may. The next attempt has other names, so nothing needs to wait for it.
    """
    due = jobset.meta.delete_by + patience.lost_node_seconds
    return bool(jobset.meta.delete_by) and now >= due and all(is_ignored(pod, now, patience) for pod in pods)


def _ended_attempt(
    stage: str,
    record: AttemptStatus,
    jobset: JobSetView | None,
    pods: tuple[PodView, ...],
    patience: Patience,
    now: float,
) -> ObservedAttempt:
    """Return an attempt that has ended, and what is left of it to delete.

    Rank 0 publishes after it has trained with all others: torchrun starts no worker before every node has joined the
    rendezvous, so its success proves that all pods were there. It does not prove that they end: a communication library
    may hang while it is torn down, and a pod that has not started waits for rank 0 for ever. Only a JobSet of which
    nothing is left to end is kept, so that its logs can be read by `kubectl`; they are in the store, too.
    """
    living = tuple(pod for pod in pods if not is_ignored(pod, now, patience))
    due = (record.ended.timestamp() if record.ended is not None else now) + patience.leftover_seconds
    reason, again = "", None
    if record.cause is not None:
        reason = "the attempt has ended"
    elif jobset is None or living or not is_finished(jobset, pods):
        rest = f"{len(living)} of its pods had" if living else "its JobSet had"
        reason = f"the attempt has succeeded, and {rest} not ended {patience.leftover_seconds:.0f} s later"
        reason, again = (reason, None) if now >= due else ("", due)
    # An attempt without a JobSet has nothing else that ends its pods.
    abandoned = tuple(pod for pod in living if not pod.meta.deleting) if jobset is None and reason else ()
    left = jobset is not None or bool(living)
    return ObservedAttempt(
        stage,
        record,
        AttemptState.ENDED,
        jobset,
        pods,
        deletion_reason=_unless_deleting(jobset, reason),
        abandoned_pods=abandoned,
        lost_pods=tuple(pod for pod in pods if is_lost(pod, now, patience)),
        look_again_at=_earliest(again, next_moment(pods, now, patience)) if left else None,
    )


def is_finished(jobset: JobSetView, pods: Sequence[PodView]) -> bool:
    """Return whether a JobSet has ended, and will not create pods any more."""
    if jobset.completed or jobset.failed:
        return True
    return not jobset.suspended and len({pod.index for pod in pods if pod.has_ended}) >= jobset.num_pods


def _without_jobset(
    stage: str,
    record: AttemptStatus,
    pods: tuple[PodView, ...],
    signals: Signals,
    now: float,
    earlier: Sequence[Attempt],
) -> ObservedAttempt:
    """Return an attempt whose JobSet is not known. It lives as long as one of its pods does.

    `kubectl delete jobset` removes a JobSet at once, and its pods end later, or never if they are orphaned.
    """
    unclear = signals.unclear.get((stage, record.number))
    if unclear is not None:
        waiting = Waiting(Reason.CREATION_REFUSED, unclear)
        return ObservedAttempt(
            stage, record, AttemptState.STARTING, pods=pods, waiting=waiting, look_again_at=now + UNCLEAR_SECONDS
        )
    success = success_of(pods)
    if success is not None:
        record = ended(_updated(record, success, pods), now, earlier)
        return _ended_attempt(stage, record, None, pods, signals.patience, now)
    lost = tuple(pod for pod in pods if is_lost(pod, now, signals.patience))
    record = with_loss(record, lost, signals.patience)
    living = tuple(pod for pod in pods if not is_ignored(pod, now, signals.patience))
    if not living:
        return ObservedAttempt(stage, ended(record, now, earlier), AttemptState.ENDED, pods=pods, lost_pods=lost)
    if not record.stopping:
        record = record.model_copy(update={"stopping": ABANDONED, "stop_cause": Cause.INFRASTRUCTURE})
    return ObservedAttempt(
        stage,
        record,
        AttemptState.STOPPING,
        pods=pods,
        abandoned_pods=tuple(pod for pod in living if not pod.meta.deleting),
        lost_pods=lost,
        look_again_at=next_moment(pods, now, signals.patience),
    )


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
    has_run = record.running_since is not None or record.ran_seconds > 0
    record = with_times(record, waiting, now)
    release = None if waiting is None else release_of(jobset, pods, has_run, wait_of(record, waiting, now).since)
    deletion_reason = "" if release is None or now < release.at else release.reason
    if deletion_reason:
        record = record.model_copy(update={"stopping": deletion_reason[:512], "stop_cause": Cause.PREEMPTION})
    loss_at = next_moment(pods, now, signals.patience)
    times = (outcome.look_again_at, loss_at, None if release is None else release.at)
    moments = [item for item in times if item is not None and item > now]
    latest = signals.reports.get((stage, record.number))
    state = AttemptState.RUNNING if waiting is None else AttemptState.STARTING
    state = AttemptState.STOPPING if deletion_reason else state
    return ObservedAttempt(
        stage,
        with_report(record, latest),
        state,
        jobset,
        pods,
        workload,
        waiting,
        deletion_reason,
        latest_report=latest,
        look_again_at=min(moments, default=None),
        settling=outcome.look_again_at is not None,
        hearing=signals.hearing,
    )


def _earliest(*moments: float | None) -> float | None:
    return min((moment for moment in moments if moment is not None), default=None)


def _unless_deleting(jobset: JobSetView | None, reason: str) -> str:
    return "" if jobset is None or jobset.meta.deleting else reason


# -- records -----------------------------------------------------------------------------------------------------------


def _updated(record: AttemptStatus, report: TerminationReport | None, pods: tuple[PodView, ...]) -> AttemptStatus:
    """Return the record with what the pods report.

    The first explanation of a failure is kept: later ones, of the other pods, are its consequences.
    """
    warnings = warnings_of(pods) or record.warnings
    record = record.model_copy(update={"incarnations": _incarnations(record, pods), "warnings": warnings})
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
            "artifact_uri": result.artifact_uri,
            "artifact_endpoint": result.artifact_endpoint,
            "exit_code": result.exit_code,
            "last_step": result.last_step,
            # A lost node is recorded before the other pods report what followed from its loss.
            "pod": record.pod or report.pod,
            "node": record.node or report.node,
            "message": result.message,
            # A stop that may recur has a fault of its own; what its pods report is a consequence.
            "fault": record.fault if record.stop_cause is not None else result.fault or "",
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
    stop_fault = "" if record.stop_cause is None else record.fault
    end = end_of_attempt(record.stop_cause, result, earlier, record.number, stop_fault)
    message = end.message if result is not None else record.message
    if end.cause is not None and record.stop_cause is not None and (end.cause is record.stop_cause or end.recurrence):
        message = "; ".join(part for part in (record.stopping, record.message) if part)
        message = f"{end.recurrence}: {message}" if end.recurrence else message
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
