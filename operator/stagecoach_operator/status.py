"""What a run's status says: conditions, stages, summary. Pure: from what is known now and what was said before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from stagecoach_api.outcomes import Cause, ExitCode
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
from stagecoach_operator.history import gpu_seconds, records_of, shortened
from stagecoach_operator.observe import Sight, moment
from stagecoach_operator.planning import Refusal, Snapshot
from stagecoach_operator.waiting import Waiting

OVER = FINISHED | ENDED
MESSAGE_CHARACTERS = 4000

Statement = tuple[ConditionStatus, Reason, str]
"""Status, reason and message of a condition."""

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN


@dataclass(frozen=True)
class Trouble:
    """Something that keeps the operator from carrying a decision out."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Scene:
    """A run that is worked on: what is known of it now."""

    snapshot: Snapshot
    decision: Decision
    sights: Sequence[Sight]
    previous: TrainingRunStatus
    generation: int
    now: float
    suspend: bool = False
    refusal: Refusal | None = None
    """Why an edit of the spec is not accepted: `snapshot` is of the spec before. None: it is of the spec as it is."""
    trouble: Trouble | None = None
    """None: everything decided could be done."""
    store_trouble: str = ""
    """Why the storage does not answer. Empty: it does."""

    def stage_sights(self, name: str) -> list[Sight]:
        return [sight for sight in self.sights if sight.stage == name]

    def living(self) -> list[Sight]:
        return [sight for sight in self.sights if sight.state is not AttemptState.ENDED]


def working_status(scene: Scene) -> TrainingRunStatus:
    """Return the status of a run that has been accepted."""
    stages = tuple(stage_status(name, view, scene) for name, view in in_spec_order(scene).items())
    statements = {
        ConditionType.ACCEPTED: accepted(scene),
        ConditionType.PLANNED: planned(scene, stages),
        ConditionType.QUOTA_RESERVED: quota(scene),
        ConditionType.PROGRESSING: progressing(scene, stages),
        ConditionType.SUSPENDED: suspended(scene),
        ConditionType.COMPLETE: complete(scene, stages),
        ConditionType.FAILED: failed(scene, stages),
    }
    return TrainingRunStatus(
        observed_generation=scene.generation,
        conditions=conditions(statements, scene.previous, scene.generation, scene.now),
        stages=stages,
        summary=summary(scene, stages),
        plan_digest=scene.snapshot.digest(),
    )


def refused_status(refusal: Refusal, previous: TrainingRunStatus, now: float) -> TrainingRunStatus:
    """Return the status of a run that cannot be accepted; nothing is done for it."""
    planned = Reason.RE_PLANNING if previous.plan_digest is not None else refusal.reason
    statements = {
        ConditionType.ACCEPTED: (FALSE, refusal.reason, refusal.message),
        ConditionType.PLANNED: (FALSE, planned, "the run is not accepted"),
        ConditionType.PROGRESSING: (FALSE, refusal.reason, "the run is not accepted"),
        ConditionType.COMPLETE: (FALSE, Reason.STAGES_UNFINISHED, ""),
        ConditionType.FAILED: (FALSE, Reason.NO_FAILURE, ""),
    }
    return previous.model_copy(
        update={
            "observed_generation": refusal.generation,
            "conditions": conditions(statements, previous, refusal.generation, now),
            "summary": Summary(state=RunState.FAILED, stage=str(refusal.reason)),
        }
    )


def accepted(scene: Scene) -> Statement:
    if scene.refusal is None:
        return TRUE, Reason.VALID, ""
    message = f"the run goes on as it was before this edit: {scene.refusal.message}"
    return FALSE, scene.refusal.reason, message[:MESSAGE_CHARACTERS]


def planned(scene: Scene, stages: Sequence[StageStatus]) -> Statement:
    if scene.refusal is None:
        return TRUE, Reason.GRAPH_RESOLVED, f"{len(stages)} stages, every input found"
    return FALSE, Reason.RE_PLANNING, "the edit is not accepted; the plan before it stands"


def in_spec_order(scene: Scene) -> Mapping[str, StageView]:
    """Return the stages in the order of the plan, which keeps that of the file where it can."""
    return {name: scene.decision.stages[name] for name in scene.snapshot.plan.stages}


# -- stages ------------------------------------------------------------------------------------------------------------


def stage_status(name: str, view: StageView, scene: Scene) -> StageStatus:
    previous = next((stage for stage in scene.previous.stages if stage.name == name), None)
    sights = scene.stage_sights(name)
    newest = max(sights, key=lambda sight: sight.record.number, default=None)
    attempts, forgotten = shortened(sights, previous, scene.now)
    state, waiting_for, message = standing(view, newest, scene)
    resources = scene.snapshot.plan.stages[name].stage.resources
    return StageStatus(
        name=name,
        state=state,
        attempt=max(view.attempt, 0 if newest is None else newest.record.number),
        digest=view.digest,
        artifact=_artifact(view),
        cached=state is StageState.CACHED,
        progress=_progress(newest),
        restarts=_restarts(view),
        last_cause=next((s.record.cause for s in reversed(sights) if s.record.ended and s.record.cause), None),
        waiting_for=waiting_for[:1024],
        started=_started(sights, previous, view),
        finished=_finished(state, view, previous, scene.now),
        gpu_seconds=gpu_seconds(
            sights, resources.num_nodes * (resources.gpus_per_node or 0), previous, records_of(scene.previous)
        ),
        message=message[:MESSAGE_CHARACTERS],
        attempts=attempts,
        forgotten=forgotten,
    )


def standing(view: StageView, newest: Sight | None, scene: Scene) -> tuple[StageState, str, str]:
    """Return a stage's state, what it waits for, and a message: the core's, and what only a cluster knows."""
    if view.state is StageState.RUNNING and newest is not None and newest.waiting is not None:
        return StageState.PENDING, newest.waiting.message, ""
    if view.state is StageState.STOPPING and newest is not None:
        return view.state, f"attempt {newest.record.number} to end", newest.record.stopping or newest.record.message
    if view.state is StageState.FAILED and newest is not None:
        return view.state, "", f"{view.message}{_place(newest)}"
    if view.state is StageState.PENDING and scene.store_trouble and view.digest is not None:
        return view.state, f"the storage: {scene.store_trouble}", view.message
    if view.state in (StageState.PENDING, StageState.RETRYING) and scene.trouble is not None:
        return view.state, scene.trouble.message, view.message
    return view.state, view.waiting_for, view.message


def _place(sight: Sight) -> str:
    """Return where an attempt ended, as far as it is known."""
    record = sight.record
    parts = [f"attempt {record.number}"]
    parts += [f"pod {record.pod}"] if record.pod else []
    parts += [f"node {record.node}"] if record.node else []
    parts += [f"exit code {record.exit_code}"] if record.exit_code is not None else []
    return f" ({', '.join(parts)})"


def _artifact(view: StageView) -> Artifact | None:
    found = view.artifact
    if found is None:
        return None
    return Artifact(uri=found.uri, stage_digest=found.stage_digest, content_digest=found.content_digest)


def _restarts(view: StageView) -> Restarts:
    return Restarts(**{cause.value: view.restarts.get(cause, 0) for cause in Cause})


def _progress(newest: Sight | None) -> StageProgress | None:
    if newest is None or newest.heard is None or newest.state is AttemptState.ENDED:
        return None
    report = newest.heard.report
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


def _started(sights: Sequence[Sight], previous: StageStatus | None, view: StageView) -> datetime | None:
    if previous is not None and previous.started is not None and previous.digest == view.digest:
        return previous.started
    return min((sight.record.started for sight in sights if sight.record.digest == view.digest), default=None)


def _finished(state: StageState, view: StageView, previous: StageStatus | None, now: float) -> datetime | None:
    if state not in OVER:
        return None
    if previous is not None and previous.finished is not None and previous.digest == view.digest:
        return previous.finished
    return moment(now)


# -- conditions --------------------------------------------------------------------------------------------------------


def quota(scene: Scene) -> Statement:
    """Say whether every stage that could run has its quota; Kueue's own words where it has not."""
    queued = [sight for sight in scene.living() if sight.jobset is not None and sight.jobset.queue]
    if not queued:
        return TRUE, Reason.NO_QUEUE, "nothing waits in a queue"
    for sight in queued:
        waiting = sight.waiting
        if waiting is not None and waiting.reason in (Reason.WAITING_FOR_QUOTA, Reason.PREEMPTED):
            return FALSE, waiting.reason, f"stage `{sight.stage}`: {waiting.message}"
    return TRUE, Reason.ADMITTED, ", ".join(f"stage `{sight.stage}`" for sight in queued)


def progressing(scene: Scene, stages: Sequence[StageStatus]) -> Statement:  # noqa: PLR0911 - first that holds
    if scene.trouble is not None:
        return FALSE, scene.trouble.reason, scene.trouble.message
    state, message = scene.decision.state, scene.decision.message
    if state is not RunState.PROGRESSING:
        return FALSE, Reason.NOTHING_TO_DO, message
    if scene.store_trouble:
        return FALSE, Reason.STORAGE_UNREACHABLE, scene.store_trouble
    running = [stage.name for stage in stages if stage.state is StageState.RUNNING]
    waiting = [(sight.stage, sight.waiting) for sight in scene.living() if sight.waiting is not None]
    if waiting and not running:
        name, first = _worst(waiting)
        return TRUE, first.reason, f"stage `{name}`: {first.message}"
    if running:
        return TRUE, Reason.STAGES_RUNNING, f"running: {', '.join(running)}"
    retrying = [stage for stage in stages if stage.state is StageState.RETRYING]
    if retrying:
        return TRUE, Reason.RETRYING, f"stage `{retrying[0].name}`: {retrying[0].message}"
    return TRUE, Reason.WAITING_FOR_PODS, message


def _worst(waiting: Sequence[tuple[str, Waiting | None]]) -> tuple[str, Waiting]:
    told = [(name, item) for name, item in waiting if item is not None]
    return min(told, key=lambda pair: pair[1].reason is Reason.WAITING_FOR_PODS)


def suspended(scene: Scene) -> Statement:
    if not scene.suspend:
        return FALSE, Reason.NOT_SUSPENDED, ""
    living = scene.living()
    if living:
        names = ", ".join(f"`{sight.stage}`" for sight in living)
        return FALSE, Reason.STOPPING_STAGES, f"{names} end at a checkpoint"
    return TRUE, Reason.SUSPENDED_BY_USER, _last_steps(scene)


def _last_steps(scene: Scene) -> str:
    """Say at which step each stopped stage goes on."""
    newest = {sight.stage: sight.record for sight in scene.sights}
    steps = [f"`{name}` at step {record.last_step}" for name, record in newest.items() if record.last_step is not None]
    return f"checkpoints: {', '.join(steps)}" if steps else ""


def complete(scene: Scene, stages: Sequence[StageStatus]) -> Statement:
    done = sum(stage.state in FINISHED for stage in stages)
    if scene.decision.state is RunState.COMPLETE:
        cached = sum(stage.state is StageState.CACHED for stage in stages)
        return TRUE, Reason.ALL_STAGES_FINISHED, f"{len(stages)} stages, {cached} of them cached"
    return FALSE, Reason.STAGES_UNFINISHED, f"{done} of {len(stages)} stages are finished"


def failed(scene: Scene, stages: Sequence[StageStatus]) -> Statement:
    state = scene.decision.state
    if state is RunState.CANCELLED:
        return TRUE, Reason.CANCELLED, scene.decision.message
    if state is not RunState.FAILED:
        return FALSE, Reason.NO_FAILURE, ""
    culprit = next((stage for stage in stages if stage.state is StageState.FAILED), None)
    if culprit is None:
        return TRUE, Reason.RETRIES_EXHAUSTED, scene.decision.message
    return TRUE, failure_reason(culprit), f"stage `{culprit.name}`: {culprit.message}"


REASON_OF_EXIT = {
    int(ExitCode.USER_ERROR): Reason.USER_ERROR,
    int(ExitCode.GATE_FAILED): Reason.GATE_MISSED,
    int(ExitCode.DIVERGED): Reason.DIVERGED,
}


def failure_reason(stage: StageStatus) -> Reason:
    """Return in one word why a stage failed for good."""
    last = next((record for record in reversed(stage.attempts) if record.cause in CHARGED), None)
    if last is None or last.cause is not Cause.USER:
        return Reason.RETRIES_EXHAUSTED
    if last.exit_code is not None and last.exit_code in REASON_OF_EXIT:
        return REASON_OF_EXIT[last.exit_code]
    return Reason.TIMED_OUT if last.stop_cause is Cause.USER else Reason.USER_ERROR


def conditions(
    statements: Mapping[ConditionType, Statement], previous: TrainingRunStatus, generation: int, now: float
) -> tuple[Condition, ...]:
    """Return the conditions; the time of one changes only with its status."""
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


# -- for people --------------------------------------------------------------------------------------------------------


def summary(scene: Scene, stages: Sequence[StageStatus]) -> Summary:
    """Return what `kubectl get` shows: of the stage that is worked on, or would be next."""
    done = sum(stage.state in FINISHED for stage in stages)
    current = next((stage for stage in stages if stage.state in LIVING), None) or next(
        (stage for stage in stages if stage.state not in FINISHED), None
    )
    progress = None if current is None else current.progress
    return Summary(
        state=scene.decision.state,
        stage=f"{done}/{len(stages)}" + ("" if current is None else f" {current.name}"),
        progress=_share(progress),
        eta=None if progress is None else progress.eta,
        restarts=sum(getattr(stage.restarts, cause.value) for stage in stages for cause in CHARGED),
    )


def _share(progress: StageProgress | None) -> str:
    if progress is None:
        return ""
    if not progress.total:
        return progress.activity[:32]
    return f"{min(100, 100 * progress.done // progress.total)} %"


# -- writing -----------------------------------------------------------------------------------------------------------


def as_json(status: TrainingRunStatus) -> dict[str, Any]:
    """Return the status as it is written: fields that are None are left out."""
    dumped: dict[str, Any] = status.model_dump(mode="json", exclude_none=True)
    return dumped


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the merge patch that makes `after` of `before`; empty where they are equal."""
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
    """Return what of a status is worth a write at once; the rest may wait for what comes with it."""
    return (
        status.observed_generation,
        status.plan_digest,
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
    """Return a status (as JSON) without what changes with every report of an attempt."""
    kept = {**status, "summary": {**(status.get("summary") or {}), "progress": "", "eta": None}}
    kept["stages"] = [{**stage, "progress": None} for stage in status.get("stages") or ()]
    return kept
