"""What people are told: the state of every stage, what it waits for, and the state of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagecoach_core.policies import capacity
from stagecoach_core.survey import StageFacts
from stagecoach_core.values import Observed, RunState, StageState, StageView

TERMINAL = frozenset({RunState.COMPLETE, RunState.FAILED, RunState.CANCELLED})
"""States a run does not leave by itself."""


@dataclass(frozen=True)
class Outlook:
    """The facts, and what was decided about them."""

    facts: Mapping[str, StageFacts]
    observed: Observed
    now: float
    stopping: frozenset[str]
    """Stages of which an attempt is told to stop now."""
    starting: frozenset[str]
    asking: frozenset[str]
    """Stages the store is asked about."""
    blocked: Mapping[str, str]
    """Stages that will not be worked on, with the reason."""

    @property
    def failed(self) -> list[str]:
        return [name for name, stage in self.facts.items() if stage.failed]


def blockers(facts: Mapping[str, StageFacts]) -> dict[str, str]:
    """Return the stages that will never be worked on as things are, with the reason."""
    blocked: dict[str, str] = {}
    for name, stage in facts.items():
        if stage.finished or stage.failed:
            continue
        reason = _blocker(stage, facts, blocked)
        if reason:
            blocked[name] = reason
    return blocked


def _blocker(stage: StageFacts, facts: Mapping[str, StageFacts], blocked: Mapping[str, str]) -> str:
    for name in stage.upstream:
        if facts[name].failed:
            return f"stage `{name}` failed"
        if name in blocked:
            unselected = f"it needs stage `{name}`, which is not selected and has no artifact"
            return blocked[name] if facts[name].selected or not stage.selected else unselected
    return "" if stage.selected or (stage.needed and stage.unsettled) else "not selected"


# -- stages ------------------------------------------------------------------------------------------------------------


def view_of(name: str, outlook: Outlook) -> StageView:
    """Return what is told of one stage."""
    stage = outlook.facts[name]
    state, waiting_for, message = _standing(stage, outlook)
    return StageView(
        state=state,
        digest=stage.digest,
        artifact=stage.artifact,
        attempt=stage.newest,
        restarts=stage.verdict.restarts,
        waiting_for=waiting_for,
        message=message,
    )


def _standing(stage: StageFacts, outlook: Outlook) -> tuple[StageState, str, str]:
    """Return a stage's state, what it waits for, and a message."""
    if stage.finished:
        closing = f"attempt {stage.living[-1].number} to end" if stage.living else ""
        return (StageState.SUCCEEDED if stage.made_here else StageState.CACHED), closing, ""
    if stage.living:
        return _living(stage, outlook)
    if stage.failed:
        return StageState.FAILED, "", stage.verdict.message
    if stage.name in outlook.blocked:
        return StageState.SKIPPED, "", outlook.blocked[stage.name]
    if outlook.observed.cancel and not outlook.failed:  # a wish after a failure changes nothing
        return StageState.CANCELLED, "", "the run is cancelled"
    return _waiting(stage, outlook)


def _living(stage: StageFacts, outlook: Outlook) -> tuple[StageState, str, str]:
    if stage.name in outlook.stopping or any(attempt.is_stopping for attempt in stage.living):
        return StageState.STOPPING, f"attempt {stage.living[-1].number} to end", stage.living[-1].message
    return StageState.RUNNING, "", stage.living[-1].message


def _waiting(stage: StageFacts, outlook: Outlook) -> tuple[StageState, str, str]:
    if stage.name in outlook.asking:
        return StageState.PENDING, f"the store's answer whether artifact {(stage.digest or '')[:12]} exists", ""
    if outlook.failed and not outlook.asking:
        return StageState.SKIPPED, "", f"not started: {_stages(outlook.failed)} failed"
    if outlook.observed.suspend:
        return StageState.SUSPENDED, "the run to be resumed", stage.verdict.message
    if stage.upstream:
        return StageState.PENDING, _stages(stage.upstream), ""
    state = StageState.RETRYING if stage.verdict.restarts else StageState.PENDING
    return state, _turn(stage, outlook), stage.verdict.message


def _turn(stage: StageFacts, outlook: Outlook) -> str:
    """Return what a stage with all inputs waits for."""
    if stage.name in outlook.starting:
        return f"attempt {stage.newest + 1} to start"
    if outlook.failed:
        return "the store's answers about other stages"
    if outlook.now < stage.verdict.not_before:
        return f"the pause after attempt {stage.newest} to end"
    twin = _twin(stage, outlook)
    if twin is not None:
        return f"stage `{twin}`, which does the same work"
    return capacity.describe(outlook.observed.capacity)


def _twin(stage: StageFacts, outlook: Outlook) -> str | None:
    """Return another stage that works, or is about to, on the same digest."""
    at_work = [(attempt.stage, attempt.digest) for attempt in outlook.observed.attempts if attempt.lives]
    about_to = [(name, outlook.facts[name].digest) for name in outlook.facts if name in outlook.starting]
    return next((name for name, digest in [*at_work, *about_to] if digest == stage.digest and name != stage.name), None)


def _stages(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    if len(quoted) == 1:
        return f"stage {quoted[0]}"
    return f"stages {', '.join(quoted[:-1])} and {quoted[-1]}"


# -- the run -----------------------------------------------------------------------------------------------------------


def run_state(outlook: Outlook) -> tuple[RunState, str]:
    """Return the run's state and a message."""
    if any(attempt.lives for attempt in outlook.observed.attempts):
        return RunState.PROGRESSING, _while_living(outlook)
    unfinished = [stage for stage in outlook.facts.values() if stage.selected and not stage.finished]
    if not unfinished:
        return RunState.COMPLETE, ""
    hopeless = RunState.PROGRESSING if outlook.asking else RunState.FAILED  # answers still tell what is cached
    if outlook.failed:
        return hopeless, _failure(outlook)
    if all(stage.name in outlook.blocked for stage in unfinished):
        name = unfinished[0].name
        return hopeless, f"stage `{name}` cannot be worked on: {outlook.blocked[name]}"
    return _undecided(outlook)


def _undecided(outlook: Outlook) -> tuple[RunState, str]:
    """Return the state of a run of which nothing lives, nothing has failed, and something could be worked on."""
    if outlook.observed.cancel:
        return RunState.CANCELLED, "cancelled"
    if outlook.observed.suspend:
        return RunState.SUSPENDED, "suspended"
    return RunState.PROGRESSING, ""


def _while_living(outlook: Outlook) -> str:
    if outlook.failed:
        return f"{_failure(outlook)}; what still runs may finish"
    if outlook.observed.cancel:
        return "being cancelled"
    return "being suspended" if outlook.observed.suspend else ""


def _failure(outlook: Outlook) -> str:
    return "; ".join(f"stage `{name}` failed: {outlook.facts[name].verdict.message}" for name in outlook.failed)
