"""How an attempt ended, according to its pods: which pod's account explains the end, and what it reports. Pure.

The end of an attempt takes these forms, in this order:

    the Pod's body
    ContainerEnd        object_views: the terminated state of the trainer's container
    AttemptResult       stagecoach_api.outcomes: the termination message, if the launcher wrote one
    TerminationReport   here: one pod's result, completed or made up from the pod's state, with pod, node and time
    AttemptOutcome      here: the report that explains the attempt's end; none while that is undecided
    AttemptStatus       stagecoach_api.status: the record that is persisted in the run's status
    ObservedAttempt     observe: the record together with the objects that still exist
    Attempt             stagecoach_core.values: the same for any driver
    RetryDecision       stagecoach_core.policies.retry: from all failed attempts of a stage: retry it, or fail it
    StageView           stagecoach_core.values: the stage's state, which becomes its part of the status
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from stagecoach_api.faults import result_of_log, shortened
from stagecoach_api.outcomes import (
    CAUSE_OF_EXIT,
    OUT_OF_MEMORY_FAULT,
    PROCESS_FAULT,
    AttemptResult,
    Cause,
    ExitCode,
    bounded_warnings,
    cause_of_exit,
    process_fault,
)
from stagecoach_operator.object_views import ContainerEnd, JobSetView, PodView

SETTLE_SECONDS = 2.0
"""How long after a first failure to wait for reports of the other pods: the end of one rank brings the others down, and
the pod that is first seen to fail need not be the one that failed first."""

PREEMPTING = frozenset({"PreemptionByScheduler", "EvictionByEvictionAPI"})
"""Requested disruptions (reasons of the DisruptionTarget condition): preemption by a pod of higher priority, a drained
node. All others count as infrastructure."""

OOM_KILLED = "OOMKilled"
MESSAGE_CHARACTERS = 1000
DIGEST_LENGTH = 64
MAX_STEP = 10**15
"""The last step that a status can hold."""
SIGNAL_BASE = 128
"""Kubernetes, like a shell, reports a container killed by signal N with exit code 128 + N."""


@dataclass(frozen=True)
class TerminationReport:
    """One pod's account of the attempt's end."""

    result: AttemptResult
    """The launcher's result, sanitised; or what follows from the pod's state if there is none."""
    pod: str = ""
    """Name of the pod. Empty: the account is the JobSet's."""
    node: str = ""
    at: float = 0.0
    """When that pod ended, in seconds since the epoch by its node's clock; 0 if unknown."""

    @classmethod
    def from_launcher(cls, result: AttemptResult, end: ContainerEnd, pod: PodView) -> TerminationReport:
        """Return the launcher's own result. A custom image may write anything, so its fields are brought into range."""
        message = result.message
        if end.reason == OOM_KILLED:
            message = f"{OOM_KILLED}: the container ran out of memory; {message}"
        sanitised = result.model_copy(
            update={
                "message": shortened(message, MESSAGE_CHARACTERS),
                "exit_code": max(-256, min(256, result.exit_code)),
                "content_digest": result.content_digest if _is_digest(result.content_digest) else None,
                "artifact_uri": result.artifact_uri if _is_digest(result.content_digest) else None,
                "artifact_endpoint": result.artifact_endpoint if _is_digest(result.content_digest) else None,
                "fault": OUT_OF_MEMORY_FAULT if end.reason == OOM_KILLED else result.fault,
                "last_step": result.last_step if 0 <= (result.last_step or 0) <= MAX_STEP else None,
                "warnings": bounded_warnings(result.warnings),
            }
        )
        return cls(sanitised, pod.meta.name, pod.node, end.finished)

    @classmethod
    def from_container(cls, end: ContainerEnd, pod: PodView) -> TerminationReport:
        """Return the report of a pod whose launcher was killed or did not write a result."""
        code = end.exit_code if end.exit_code <= SIGNAL_BASE else SIGNAL_BASE - end.exit_code
        if end.reason == OOM_KILLED:
            cause: Cause | None = Cause.INFRASTRUCTURE
            fault: str | None = OUT_OF_MEMORY_FAULT
            remedy = "raise `resources.memory` or reduce the stage's memory use"
            message = f"{OOM_KILLED}: the container needed more memory than its limit; {remedy}"
        elif (died := result_of_log(code, end.message)) is not None:
            shown = died.model_copy(update={"message": shortened(died.message, MESSAGE_CHARACTERS)})
            return cls(shown, pod.meta.name, pod.node, end.finished)
        else:
            cause = None if code == 0 else cause_of_exit(code)
            # A pod that has a reason, such as `Evicted`, did not end on its own account.
            fault = None if pod.reason else process_fault(code)
            message = f"ended with exit code {code} and wrote no result"
            if pod.reason:
                message = f"{pod.reason}: {pod.message or message}"
            # With terminationMessagePolicy FallbackToLogsOnError the message holds the last lines of the log.
            message += f"\n{end.message[-MESSAGE_CHARACTERS // 2 :]}" if end.message else ""
        result = AttemptResult(exit_code=code, cause=cause, message=message[:MESSAGE_CHARACTERS], fault=fault)
        return cls(result, pod.meta.name, pod.node, end.finished)

    @classmethod
    def from_phase(cls, pod: PodView) -> TerminationReport:
        """Return the report of a pod that ended without a container state, as evicted pods may."""
        message = ": ".join(part for part in (pod.reason, pod.message) if part) or f"the pod is {pod.phase}"
        cause = None if pod.phase == "Succeeded" else Cause.INFRASTRUCTURE
        return cls(_result(cause, message), pod.meta.name, pod.node)

    def as_preempted(self, reason: str, message: str) -> TerminationReport:
        """Return the report with the cause replaced by a preemption."""
        text = f"preempted ({reason}): {message}"[:MESSAGE_CHARACTERS]
        changes = {"cause": Cause.PREEMPTION, "message": text, "content_digest": None, "artifact_uri": None}
        return replace(self, result=self.result.model_copy(update=changes))


@dataclass(frozen=True)
class AttemptOutcome:
    """Whether and how the attempt has ended, according to its pods and its JobSet."""

    report: TerminationReport | None = None
    """None if it has not ended, or it is too early to determine why."""
    look_again_at: float | None = None
    """When it is no longer too early, in seconds since the epoch. None if nothing is pending."""


def outcome_of(
    pods: Sequence[PodView], jobset: JobSetView, now: float, settling_since: float | None = None
) -> AttemptOutcome:
    """Return whether and how an attempt has ended.

    `pods`: all its known pods. `settling_since`: when a failure was first seen, by the same clock as `now`: those of
    the nodes and of the API server may differ by more than the time to wait. None if it was not seen before.
    """
    settled = (now if settling_since is None else settling_since) + SETTLE_SECONDS
    done = success_of(pods)
    if done is not None:
        return AttemptOutcome(done)
    if jobset.suspended and not jobset.failed:
        # Kueue preempts a workload by suspending its JobSet, which deletes the pods. New pods will continue this
        # attempt, so the exit codes of the old ones mean nothing.
        return AttemptOutcome()
    failed = [pod for pod in pods if pod.has_ended and _failed(pod)]
    if failed:
        return _failure(failed, pods, jobset, now, settled)
    if jobset.completed:
        return AttemptOutcome(TerminationReport(_result(None, "the JobSet is complete and its pods are gone")))
    if jobset.failed:
        report = TerminationReport(_result(Cause.INFRASTRUCTURE, f"{jobset.failed}; its pods left no result"))
        return AttemptOutcome(report) if now >= settled else AttemptOutcome(look_again_at=settled)
    return AttemptOutcome()


def success_of(pods: Sequence[PodView]) -> TerminationReport | None:
    """Return the report of a successful attempt. None if it has not succeeded.

    Pod 0 alone publishes: its success completes the attempt, whatever the other pods report.
    """
    done = next((termination_of(pod) for pod in pods if pod.index == 0 and pod.has_ended and not _failed(pod)), None)
    return done if done is not None and done.result.cause is None else None


def _failed(pod: PodView) -> bool:
    return pod.phase == "Failed" or (pod.end is not None and pod.end.exit_code != 0)


def _failure(
    failed: Sequence[PodView], pods: Sequence[PodView], jobset: JobSetView, now: float, settled: float
) -> AttemptOutcome:
    reports = [termination_of(pod) for pod in failed]
    best = min(reports, key=lambda report: (_rank(report.result), report.at))
    if jobset.meta.deleting:
        # Its pods disappear in a moment, so do not wait for more reports. The cause is that of the
        # deletion; what is needed from the pods is the newest complete checkpoint of any rank.
        last_step = newest_step(report.result.last_step for report in reports)
        return AttemptOutcome(replace(best, result=best.result.model_copy(update={"last_step": last_step})))
    complete = len({pod.index for pod in pods if pod.has_ended}) >= jobset.num_pods
    # Pods being deleted while their JobSet is not may be the first sign of a suspension by Kueue: wait for the rest.
    deleted = all(pod.meta.deleting for pod in failed)
    if _rank(best.result) == 0 or jobset.failed or (complete and not deleted):
        return AttemptOutcome(best)
    return AttemptOutcome(best) if now >= settled else AttemptOutcome(look_again_at=settled)


def warnings_of(pods: Iterable[PodView]) -> tuple[str, ...]:
    """Return the stage's warnings. Rank 0 reports them, whichever pod explains the attempt's end."""
    reports = (termination_of(pod).result.warnings for pod in pods if pod.index == 0 and pod.has_ended)
    return next((found for found in reports if found), ())


def newest_step(steps: Iterable[int | None]) -> int | None:
    """Return the newest of the known steps, or None if none is known."""
    return max((step for step in steps if step is not None), default=None)


def _rank(result: AttemptResult) -> int:
    """Rank a result by how well it explains the attempt's end.

    0: it names the error; 1: a sudden death, or an error of its own; 2: it may be a consequence of another pod's end.
    """
    if result.exit_code in CAUSE_OF_EXIT and result.exit_code != ExitCode.INTERRUPTED:
        return 0
    is_error = result.fault is not None and not result.fault.startswith(PROCESS_FAULT)
    if OOM_KILLED in result.message or result.exit_code < 0 or is_error:
        return 1
    return 1 if result.cause is Cause.PREEMPTION else 2


# -- one pod -----------------------------------------------------------------------------------------------------------


def termination_of(pod: PodView) -> TerminationReport:
    """Return the report of a pod that has ended."""
    report = _report_of(pod)
    # A user error stays one while its node is drained: another attempt would fail in the same way.
    if pod.disruption in PREEMPTING and report.result.cause not in (None, Cause.USER):
        return report.as_preempted(pod.disruption, pod.disruption_message)
    return report


def _report_of(pod: PodView) -> TerminationReport:
    if pod.end is None:
        return TerminationReport.from_phase(pod)
    result = pod.end.result()
    if result is None:
        return TerminationReport.from_container(pod.end, pod)
    return TerminationReport.from_launcher(result, pod.end, pod)


def _result(cause: Cause | None, message: str) -> AttemptResult:
    """Return the result of a pod that has no exit code."""
    return AttemptResult(exit_code=int(cause is not None), cause=cause, message=message[:MESSAGE_CHARACTERS])


def _is_digest(text: str | None) -> bool:
    return text is not None and len(text) == DIGEST_LENGTH and set(text) <= set("0123456789abcdef")
