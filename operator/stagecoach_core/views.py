"""What a decision reports: the state of every stage, what it is waiting for, and the state of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagecoach_core.facts import StageFacts
from stagecoach_core.policies import capacity
from stagecoach_core.values import Observed, RunState, StageState, StageView

TERMINAL = frozenset({RunState.COMPLETE, RunState.FAILED, RunState.CANCELLED})
"""States that a run leaves only at the user's request."""


@dataclass(frozen=True)
class DecisionContext:
    """The facts about the stages, and what was decided."""

    facts: Mapping[str, StageFacts]
    observed: Observed
    now: float
    stopping: frozenset[str]
    """Stages with an attempt that this decision stops."""
    starting: frozenset[str]
    """Stages of which this decision starts an attempt."""
    looking_up: frozenset[str]
    """Stages that this decision looks up in the store."""
    blocked: Mapping[str, str]
    """Stages that will not run, with the reason."""

    @property
    def failed(self) -> list[str]:
        return [name for name, stage in self.facts.items() if stage.failed]

    @property
    def is_stopped(self) -> bool:
        """Whether the failure of a stage keeps all others from starting."""
        return bool(self.failed) and not self.observed.keep_going


def blocked_stages(facts: Mapping[str, StageFacts]) -> dict[str, str]:
    """Return the stages that cannot run in the present state of the others, with the reason."""
    blocked: dict[str, str] = {}
    for name, stage in facts.items():
        if stage.finished or stage.failed:
            continue
        reason = _blocked_by(stage, facts, blocked)
        if reason:
            blocked[name] = reason
    return blocked


def _blocked_by(stage: StageFacts, facts: Mapping[str, StageFacts], blocked: Mapping[str, str]) -> str:
    """Return why a stage cannot run; empty if it can. `blocked`: of the stages before it."""
    for name in stage.upstream:
        if facts[name].failed:
            return f"stage `{name}` failed"
        if name in blocked:
            unselected = f"it needs stage `{name}`, which is not selected and has no artifact"
            return blocked[name] if facts[name].selected or not stage.selected else unselected
    # A needed stage that is not selected is not skipped before the look-up: its artifact may exist.
    return "" if stage.selected or (stage.needed and stage.undetermined) else "not selected"


# -- stages ------------------------------------------------------------------------------------------------------------


def view_of(name: str, context: DecisionContext) -> StageView:
    """Return the view of one stage."""
    stage = context.facts[name]
    state, waiting_for, message = _state_of(stage, context)
    return StageView(
        state=state,
        digest=stage.digest,
        artifact=stage.artifact,
        attempt=stage.newest,
        restarts=stage.retry.restarts,
        waiting_for=waiting_for,
        message=message,
    )


def _state_of(stage: StageFacts, context: DecisionContext) -> tuple[StageState, str, str]:
    """Return a stage's state, what it is waiting for, and a message."""
    # In order of precedence: a finished stage stays finished if the run is cancelled, a live attempt hides failures.
    if stage.finished:
        closing = f"attempt {stage.live_attempts[-1].number} to end" if stage.live_attempts else ""
        return (StageState.SUCCEEDED if stage.made_by_run else StageState.CACHED), closing, ""
    if stage.live_attempts:
        return _live_state(stage, context)
    if stage.failed:
        return StageState.FAILED, "", stage.retry.message
    if stage.name in context.blocked:
        return StageState.SKIPPED, "", context.blocked[stage.name]
    if context.observed.cancel and not context.is_stopped:  # a run that has failed stays failed
        return StageState.CANCELLED, "", "the run is cancelled"
    return _waiting_state(stage, context)


def _live_state(stage: StageFacts, context: DecisionContext) -> tuple[StageState, str, str]:
    if stage.name in context.stopping or any(attempt.is_stopping for attempt in stage.live_attempts):
        return StageState.STOPPING, f"attempt {stage.live_attempts[-1].number} to end", stage.live_attempts[-1].message
    return StageState.RUNNING, "", stage.live_attempts[-1].message


def _waiting_state(stage: StageFacts, context: DecisionContext) -> tuple[StageState, str, str]:
    if stage.claim is not None and not context.failed and not context.observed.suspend:
        made = f"artifact {(stage.digest or '')[:12]}, which is being made by {stage.claim.by}"
        return StageState.PENDING, made, stage.retry.message
    if stage.name in context.looking_up:
        return StageState.PENDING, f"the store's answer whether artifact {(stage.digest or '')[:12]} exists", ""
    if context.is_stopped and not context.looking_up:
        return StageState.SKIPPED, "", f"not started: {_stages(context.failed)} failed"
    if context.observed.suspend:
        return StageState.SUSPENDED, "the run to be resumed", stage.retry.message
    if stage.upstream:
        return StageState.PENDING, _stages(stage.upstream), ""
    state = StageState.RETRYING if stage.retry.restarts else StageState.PENDING
    return state, _ready_stage_waits_for(stage, context), stage.retry.message


def _ready_stage_waits_for(stage: StageFacts, context: DecisionContext) -> str:
    """Return what a stage whose inputs are all finished is waiting for."""
    if stage.name in context.starting:
        return f"attempt {stage.newest + 1} to start"
    if context.is_stopped:
        return "the store's answers about other stages"  # the run will fail, but look-ups are open
    if context.now < stage.retry.not_before:
        return f"the back-off after attempt {stage.newest} to end"
    other = _same_work(stage, context)
    if other is not None:
        return f"stage `{other}`, which does the same work"
    return capacity.describe_limits(context.observed.capacity)


def _same_work(stage: StageFacts, context: DecisionContext) -> str | None:
    """Return another stage that runs, or is about to run, the same digest."""
    running = [(attempt.stage, attempt.digest) for attempt in context.observed.attempts if attempt.is_live]
    starting = [(name, context.facts[name].digest) for name in context.facts if name in context.starting]
    return next((name for name, digest in [*running, *starting] if digest == stage.digest and name != stage.name), None)


def _stages(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    if len(quoted) == 1:
        return f"stage {quoted[0]}"
    return f"stages {', '.join(quoted[:-1])} and {quoted[-1]}"


# -- the run -----------------------------------------------------------------------------------------------------------


def run_state(context: DecisionContext) -> tuple[RunState, str]:
    """Return the run's state and a message."""
    # No terminal state while an attempt is live, even one of a removed stage: it occupies the cluster or the machine.
    if any(attempt.is_live for attempt in context.observed.attempts):
        return RunState.PROGRESSING, _live_message(context)
    unfinished = [stage for stage in context.facts.values() if stage.selected and not stage.finished]
    if not unfinished:
        return RunState.COMPLETE, ""
    # Pending look-ups are awaited, so that the final status shows which stages are cached.
    ending = RunState.PROGRESSING if context.looking_up else RunState.FAILED
    is_over = all(stage.failed or stage.name in context.blocked for stage in unfinished)
    # Before suspension and cancellation: a failed run stays Failed, whatever is requested afterwards.
    if context.is_stopped or (context.failed and is_over):
        return ending, _failure_message(context)
    if is_over:
        name = unfinished[0].name
        return ending, f"stage `{name}` cannot run: {context.blocked[name]}"
    return _idle_state(context)


def _idle_state(context: DecisionContext) -> tuple[RunState, str]:
    """Return the state of a run without live attempts, and with a stage that could run."""
    failures = f"; {_failure_message(context)}" if context.failed else ""
    if context.observed.cancel:
        return RunState.CANCELLED, f"cancelled{failures}"
    if context.observed.suspend:
        return RunState.SUSPENDED, f"suspended{failures}"
    return RunState.PROGRESSING, failures.removeprefix("; ")


def _live_message(context: DecisionContext) -> str:
    if context.failed:
        others = (
            "stages that do not need it continue" if context.observed.keep_going else "stages that still run may finish"
        )
        return f"{_failure_message(context)}; {others}"
    if context.observed.cancel:
        return "being cancelled"
    return "being suspended" if context.observed.suspend else ""


def _failure_message(context: DecisionContext) -> str:
    """Name every stage that failed, and those that cannot run because of it."""
    failures = [f"stage `{name}` failed: {context.facts[name].retry.message}" for name in context.failed]
    skipped = [name for name in context.blocked if context.facts[name].selected]
    text = f"not run, because they need it: {', '.join(f'`{name}`' for name in skipped)}"
    return "; ".join([*failures, *[text] * bool(skipped and context.observed.keep_going)])
