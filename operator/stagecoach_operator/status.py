"""The status of a run: conditions, stages, summary. Pure: computed from the current state and the previous status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from stagecoach_api.faults import shortened
from stagecoach_api.outcomes import WAITING_FAULT, Cause, ExitCode
from stagecoach_api.status import (
    ENDED,
    FINISHED,
    LIVING,
    Artifact,
    Condition,
    ConditionStatus,
    ConditionType,
    Reason,
    Restarts,
    StageProgress,
    StageStatus,
    Summary,
    TrainingRunStatus,
)
from stagecoach_core.policies.retry import CHARGED
from stagecoach_core.values import AttemptState, Decision, RunState, StageState, StageView
from stagecoach_operator.attempt_client import Blocker
from stagecoach_operator.attempt_history import MAX_ATTEMPTS, MAX_COUNT, bounded, gpu_seconds, records_of
from stagecoach_operator.attempt_times import moment
from stagecoach_operator.observe import ObservedAttempt
from stagecoach_operator.planning import FrozenPlan, Rejection
from stagecoach_operator.pod_startup import Waiting
from stagecoach_operator.requests import NO_REQUEST, Request
from stagecoach_operator.status_size import Room, fitted

OVER = FINISHED | ENDED
MESSAGE_CHARACTERS = 4000

Statement = tuple[ConditionStatus, Reason, str]
"""Status, reason and message of a condition."""

TRUE, FALSE = ConditionStatus.TRUE, ConditionStatus.FALSE


@dataclass(frozen=True)
class StatusInputs:
    """What the status of an accepted run is computed from."""

    frozen: FrozenPlan
    decision: Decision
    attempts: Sequence[ObservedAttempt]
    previous: TrainingRunStatus
    generation: int
    now: float
    suspend: bool = False
    rejection: Rejection | None = None
    """Why an edit of the spec is not accepted; `frozen` is then the previous plan. None if it is accepted."""
    blocker: Blocker | None = None
    """Why an attempt could not be created. None if everything decided was carried out."""
    store_error: str = ""
    """Why the storage is unavailable. Empty if it is available."""
    avoided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Nodes that new attempts avoid, by stage."""
    unheard: str = ""
    """Why silent attempts are not taken for hanging. Empty if none is silent, or they are."""
    request: Request = NO_REQUEST
    """The user's last request for a retry."""

    def of_stage(self, name: str) -> list[ObservedAttempt]:
        return [attempt for attempt in self.attempts if attempt.stage == name]

    def living(self) -> list[ObservedAttempt]:
        return [attempt for attempt in self.attempts if attempt.state is not AttemptState.ENDED]


def working_status(inputs: StatusInputs) -> TrainingRunStatus:
    """Return the status of a run that has been accepted. It is small enough to be stored."""
    return fitted(lambda room: _working_status(inputs, room))


def _working_status(inputs: StatusInputs, room: Room) -> TrainingRunStatus:
    stages = tuple(stage_status(name, view, inputs, room.attempts) for name, view in in_spec_order(inputs).items())
    statements = {
        ConditionType.ACCEPTED: accepted(inputs),
        ConditionType.PLANNED: planned(inputs, stages),
        ConditionType.QUOTA_RESERVED: quota(inputs),
        ConditionType.PROGRESSING: progressing(inputs, stages),
        ConditionType.SUSPENDED: suspended(inputs),
        ConditionType.COMPLETE: complete(inputs, stages),
        ConditionType.FAILED: failed(inputs, stages),
    }
    return TrainingRunStatus(
        observed_generation=inputs.generation,
        conditions=conditions(statements, inputs.previous, inputs.generation, inputs.now),
        stages=stages,
        summary=summary(inputs, stages),
        retry=inputs.request.token,
        plan_digest=inputs.frozen.digest(),
    )


def rejected_status(rejection: Rejection, previous: TrainingRunStatus, now: float) -> TrainingRunStatus:
    """Return the status of a run that was never accepted; nothing is created for it."""
    planned = Reason.RE_PLANNING if previous.plan_digest is not None else rejection.reason
    statements = {
        ConditionType.ACCEPTED: (FALSE, rejection.reason, rejection.message),
        ConditionType.PLANNED: (FALSE, planned, "the run is not accepted"),
        ConditionType.PROGRESSING: (FALSE, rejection.reason, "the run is not accepted"),
        ConditionType.COMPLETE: (FALSE, Reason.STAGES_UNFINISHED, ""),
        ConditionType.FAILED: (FALSE, Reason.NO_FAILURE, ""),
    }
    return previous.model_copy(
        update={
            "observed_generation": rejection.generation,
            "conditions": conditions(statements, previous, rejection.generation, now),
            "summary": Summary(state=RunState.FAILED, stage=str(rejection.reason)),
        }
    )


def accepted(inputs: StatusInputs) -> Statement:
    if inputs.rejection is None:
        return TRUE, Reason.VALID, ""
    message = f"the run continues with the spec before this edit: {inputs.rejection.message}"
    return FALSE, inputs.rejection.reason, message[:MESSAGE_CHARACTERS]


def planned(inputs: StatusInputs, stages: Sequence[StageStatus]) -> Statement:
    if inputs.rejection is None:
        return TRUE, Reason.GRAPH_RESOLVED, f"{len(stages)} stages, every input found"
    return FALSE, Reason.RE_PLANNING, "the edit is not accepted; the previous plan remains in force"


def in_spec_order(inputs: StatusInputs) -> Mapping[str, StageView]:
    """Return the stages in the order of the plan: topological, otherwise as in the spec."""
    return {name: inputs.decision.stages[name] for name in inputs.frozen.plan.stages}


# -- stages ------------------------------------------------------------------------------------------------------------


def stage_status(name: str, view: StageView, inputs: StatusInputs, most: int = MAX_ATTEMPTS) -> StageStatus:
    """Return the status of a stage. `most`: attempts that are listed; older ones are counted."""
    previous = next((stage for stage in inputs.previous.stages if stage.name == name), None)
    observed = inputs.of_stage(name)
    newest = max(observed, key=lambda attempt: attempt.record.number, default=None)
    counted_from = inputs.request.counted_from.get(name, 0)
    counted = None if previous is None or inputs.request.is_new else previous.forgotten
    attempts, forgotten = bounded(observed, counted, inputs.now, counted_from, most)
    state, waiting_for, message = stage_state(view, newest, inputs)
    resources = inputs.frozen.plan.stages[name].stage.resources
    return StageStatus(
        name=name,
        state=state,
        attempt=max(view.attempt, 0 if newest is None else newest.record.number),
        counted_from=counted_from,
        digest=view.digest,
        artifact=_artifact(view, inputs.frozen.storage.endpoint or ""),
        cached=state is StageState.CACHED,
        progress=_progress(newest),
        restarts=_restarts(view),
        last_cause=next((s.record.cause for s in reversed(observed) if s.record.ended and s.record.cause), None),
        waiting_for=waiting_for[:1024],
        started=_started(observed, previous, view),
        finished=_finished(state, view, previous, inputs.now),
        gpu_seconds=gpu_seconds(
            observed, resources.num_nodes * (resources.gpus_per_node or 0), previous, records_of(inputs.previous)
        ),
        message=message[:MESSAGE_CHARACTERS],
        avoided_nodes=inputs.avoided.get(name, () if previous is None else previous.avoided_nodes),
        attempts=attempts,
        forgotten=forgotten,
    )


def stage_state(view: StageView, newest: ObservedAttempt | None, inputs: StatusInputs) -> tuple[StageState, str, str]:
    """Return a stage's state, what it waits for, and a message: the core's, refined by what only a cluster knows."""
    if view.state is StageState.RUNNING and newest is not None and newest.waiting is not None:
        return StageState.PENDING, newest.waiting.message, ""
    if view.state is StageState.STOPPING and newest is not None:
        return view.state, f"attempt {newest.record.number} to end", newest.record.stopping or newest.record.message
    if view.state is StageState.FAILED and newest is not None:
        return view.state, "", f"{view.message}{_location(newest)}"
    if view.state is StageState.PENDING and inputs.store_error and view.digest is not None:
        return view.state, f"the storage: {inputs.store_error}", view.message
    if view.state in (StageState.PENDING, StageState.RETRYING) and inputs.blocker is not None:
        return view.state, inputs.blocker.message, view.message
    return view.state, view.waiting_for, view.message


def _location(attempt: ObservedAttempt) -> str:
    """Return where an attempt ended, as far as known."""
    record = attempt.record
    parts = [f"attempt {record.number}"]
    parts += [f"pod {record.pod}"] if record.pod else []
    parts += [f"node {record.node}"] if record.node else []
    parts += [f"exit code {record.exit_code}"] if record.exit_code is not None else []
    return f" ({', '.join(parts)})"


def _artifact(view: StageView, endpoint: str) -> Artifact | None:
    found = view.artifact
    if found is None:
        return None
    return Artifact(
        uri=found.uri, endpoint=endpoint, stage_digest=found.stage_digest, content_digest=found.content_digest
    )


def _restarts(view: StageView) -> Restarts:
    return Restarts(**{cause.value: view.restarts.get(cause, 0) for cause in Cause})


def _progress(newest: ObservedAttempt | None) -> StageProgress | None:
    if newest is None or newest.latest_report is None or newest.state is AttemptState.ENDED:
        return None
    report = newest.latest_report.report
    done, total = report.done, report.total
    if total is None and report.percentage is not None:
        done, total = float(report.percentage), 100.0
    remaining = report.remaining_seconds
    return StageProgress(
        activity=report.activity[:64],
        done=int(max(0.0, done)),
        total=None if total is None else int(total),
        unit=(report.unit or ("%" if report.total is None and total is not None else ""))[:32],
        eta=None if remaining is None else moment(report.time + remaining),
    )


def _started(attempts: Sequence[ObservedAttempt], previous: StageStatus | None, view: StageView) -> datetime | None:
    if previous is not None and previous.started is not None and previous.digest == view.digest:
        return previous.started
    return min((attempt.record.started for attempt in attempts if attempt.record.digest == view.digest), default=None)


def _finished(state: StageState, view: StageView, previous: StageStatus | None, now: float) -> datetime | None:
    if state not in OVER:
        return None
    if previous is not None and previous.finished is not None and previous.digest == view.digest:
        return previous.finished
    return moment(now)


# -- conditions --------------------------------------------------------------------------------------------------------


def quota(inputs: StatusInputs) -> Statement:
    """Return whether every queued stage has its quota, with Kueue's own message if one has not."""
    queued = [attempt for attempt in inputs.living() if attempt.jobset is not None and attempt.jobset.queue]
    if not queued:
        return TRUE, Reason.NO_QUEUE, "no stage uses a queue"
    for attempt in queued:
        waiting = attempt.waiting
        if waiting is not None and waiting.reason in (Reason.WAITING_FOR_QUOTA, Reason.PREEMPTED):
            return FALSE, waiting.reason, f"stage `{attempt.stage}`: {waiting.message}"
    return TRUE, Reason.ADMITTED, ", ".join(f"stage `{attempt.stage}`" for attempt in queued)


def progressing(inputs: StatusInputs, stages: Sequence[StageStatus]) -> Statement:  # noqa: PLR0911 - the first case that applies
    if inputs.blocker is not None:
        return FALSE, inputs.blocker.reason, inputs.blocker.message
    state, message = inputs.decision.state, inputs.decision.message
    if state is not RunState.PROGRESSING:
        return FALSE, Reason.NOTHING_TO_DO, message
    if inputs.store_error:
        return FALSE, Reason.STORAGE_UNREACHABLE, inputs.store_error
    running = [stage.name for stage in stages if stage.state is StageState.RUNNING]
    waiting = [(attempt.stage, attempt.waiting) for attempt in inputs.living() if attempt.waiting is not None]
    if waiting and not running:
        name, first = _worst(waiting)
        return TRUE, first.reason, f"stage `{name}`: {first.message}"
    if running:
        text = f"running: {', '.join(running)}"
        return TRUE, Reason.STAGES_RUNNING, f"{text}; {inputs.unheard}" if inputs.unheard else text
    retrying = [stage for stage in stages if stage.state is StageState.RETRYING]
    if retrying:
        return TRUE, Reason.RETRYING, f"stage `{retrying[0].name}`: {retrying[0].message}"
    return TRUE, Reason.WAITING_FOR_PODS, message


def _worst(waiting: Sequence[tuple[str, Waiting | None]]) -> tuple[str, Waiting]:
    """Return a wait that a user can act on, if there is one."""
    waits = [(name, item) for name, item in waiting if item is not None]
    return min(waits, key=lambda pair: pair[1].reason is Reason.WAITING_FOR_PODS)


def suspended(inputs: StatusInputs) -> Statement:
    if not inputs.suspend:
        return FALSE, Reason.NOT_SUSPENDED, ""
    living = inputs.living()
    if living:
        names = ", ".join(f"`{attempt.stage}`" for attempt in living)
        return FALSE, Reason.STOPPING_STAGES, f"saving a checkpoint and stopping: {names}"
    return TRUE, Reason.SUSPENDED_BY_USER, _last_steps(inputs)


def _last_steps(inputs: StatusInputs) -> str:
    """Return the step from which each stopped stage resumes."""
    newest = {attempt.stage: attempt.record for attempt in inputs.attempts}
    steps = [f"`{name}` at step {record.last_step}" for name, record in newest.items() if record.last_step is not None]
    return f"checkpoints: {', '.join(steps)}" if steps else ""


def complete(inputs: StatusInputs, stages: Sequence[StageStatus]) -> Statement:
    done = sum(stage.state in FINISHED for stage in stages)
    if inputs.decision.state is RunState.COMPLETE:
        cached = sum(stage.state is StageState.CACHED for stage in stages)
        return TRUE, Reason.ALL_STAGES_FINISHED, f"{len(stages)} stages, {cached} of them cached"
    return FALSE, Reason.STAGES_UNFINISHED, f"{done} of {len(stages)} stages are finished"


def failed(inputs: StatusInputs, stages: Sequence[StageStatus]) -> Statement:
    state = inputs.decision.state
    if state is RunState.CANCELLED:
        return TRUE, Reason.CANCELLED, inputs.decision.message
    if state is not RunState.FAILED:
        return FALSE, Reason.NO_FAILURE, ""
    culprits = [stage for stage in stages if stage.state is StageState.FAILED]
    if not culprits:
        return TRUE, Reason.RETRIES_EXHAUSTED, inputs.decision.message
    # Each stage's own message first; then what did not run, which the core's message names.
    share = MESSAGE_CHARACTERS // len(culprits)
    texts = [f"stage `{stage.name}`: {shortened(stage.message, share)}" for stage in culprits]
    skipped = [f"`{stage.name}`" for stage in stages if stage.state is StageState.SKIPPED]
    texts += [f"not run: {', '.join(skipped)}"] if skipped and len(stages) > 1 else []
    return TRUE, failure_reason(culprits[0]), "; ".join(texts)


_REASONS = {reason.value: reason for reason in Reason}
REASON_OF_EXIT = {
    int(ExitCode.USER_ERROR): Reason.USER_ERROR,
    int(ExitCode.GATE_FAILED): Reason.GATE_MISSED,
    int(ExitCode.DIVERGED): Reason.DIVERGED,
}


def failure_reason(stage: StageStatus) -> Reason:
    """Return the reason of a stage's permanent failure."""
    last = next((record for record in reversed(stage.attempts) if record.cause in CHARGED), None)
    if last is None or last.cause is not Cause.USER:
        return Reason.RETRIES_EXHAUSTED
    if last.fault.startswith(WAITING_FAULT):
        return _REASONS.get(last.fault.removeprefix(WAITING_FAULT), Reason.TIMED_OUT)
    if last.exit_code is not None and last.exit_code in REASON_OF_EXIT:
        return REASON_OF_EXIT[last.exit_code]
    return Reason.TIMED_OUT if last.stop_cause is Cause.USER else Reason.USER_ERROR


def conditions(
    statements: Mapping[ConditionType, Statement], previous: TrainingRunStatus, generation: int, now: float
) -> tuple[Condition, ...]:
    """Return the conditions. As everywhere in Kubernetes, the transition time changes only with the status."""
    before = {condition.type: condition for condition in previous.conditions}
    made = []
    for kind, (status, reason, message) in statements.items():
        old = before.get(kind)
        same = old is not None and old.status is status
        since = old.last_transition_time if old is not None and same else moment(now)
        made.append(
            Condition(
                type=kind,
                status=status,
                reason=reason,
                message=message[:MESSAGE_CHARACTERS],
                observed_generation=generation,
                last_transition_time=since,
            )
        )
    return tuple(made)


# -- the summary -------------------------------------------------------------------------------------------------------


def summary(inputs: StatusInputs, stages: Sequence[StageStatus]) -> Summary:
    """Return what `kubectl get` prints: the current stage, or the next one if none is being worked on."""
    done = sum(stage.state in FINISHED for stage in stages)
    current = next((stage for stage in stages if stage.state in LIVING), None) or next(
        (stage for stage in stages if stage.state not in FINISHED), None
    )
    progress = None if current is None else current.progress
    return Summary(
        state=inputs.decision.state,
        stage=f"{done}/{len(stages)}" + ("" if current is None else f" {current.name}"),
        progress=_progress_text(progress),
        eta=None if progress is None else progress.eta,
        restarts=min(MAX_COUNT, sum(map(num_restarts, stages))),
    )


def num_restarts(stage: StageStatus) -> int:
    """Return how many attempts followed a failure that is charged. The last failure is followed by none yet."""
    failures = sum(getattr(stage.restarts, cause.value) for cause in CHARGED)
    last = stage.attempts[-1] if stage.attempts else None
    is_last = last is not None and last.ended is not None and last.cause in CHARGED and last.digest == stage.digest
    return max(0, int(failures) - int(is_last))


def _progress_text(progress: StageProgress | None) -> str:
    if progress is None:
        return ""
    if not progress.total:
        return progress.activity[:32]
    return f"{min(100, 100 * progress.done // progress.total)} %"


# -- writing -----------------------------------------------------------------------------------------------------------


def as_json(status: TrainingRunStatus) -> dict[str, Any]:
    """Return the status as JSON, without the fields that are None."""
    dumped: dict[str, Any] = status.model_dump(mode="json", exclude_none=True)
    return dumped


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON merge patch (RFC 7386) that turns `before` into `after`; empty if they are equal."""
    patch: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            inner = merge_patch(old, value)
            if inner:
                patch[key] = inner
        elif old != value:
            patch[key] = value
    return patch


def milestones(status: TrainingRunStatus) -> object:
    """Return the part of a status whose changes are written at once; the rest may wait to be written together."""
    return (
        status.observed_generation,
        status.plan_digest,
        status.retry,
        [(item.type, item.status) for item in status.conditions],
        [
            (
                stage.name,
                stage.artifact,
                stage.state in OVER,
                [(item.number, item.ended, item.cause, item.stop_cause) for item in stage.attempts],
            )
            for stage in status.stages
        ],
    )


def without_progress(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return a status (as JSON) without the fields that change with every progress report."""
    summary = status.get("summary")
    kept = {**status, "summary": {**(summary if isinstance(summary, dict) else {}), "progress": "", "eta": None}}
    kept["stages"] = [
        {**stage, "progress": None, "attempts": [_without_report(item) for item in _objects(stage.get("attempts"))]}
        for stage in _objects(status.get("stages"))
    ]
    return kept


def _objects(value: object) -> list[dict[str, Any]]:
    """Return the objects of a list. The stored status may have anything in their place."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _without_report(attempt: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attempt.items() if key not in ("lastReport", "longestSilenceSeconds")}
