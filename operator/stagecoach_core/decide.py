"""The state machine: from a plan and what is observed to what is to be done. Pure; the clock is an argument.

It is level-triggered: nothing is remembered between two calls, everything follows from what is seen now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stagecoach_core.policies.capacity import fitting, num_ranks
from stagecoach_core.policies.stopping import (
    stop_cancelled,
    stop_duplicate,
    stop_removed,
    stop_superseded,
    stop_suspended,
    stop_unselected,
)
from stagecoach_core.policies.timeout import deadline, overdue
from stagecoach_core.survey import StageFacts, survey
from stagecoach_core.values import Action, Attempt, Decision, LookUp, Observed, Plan, Start, Stop
from stagecoach_core.views import TERMINAL, Outlook, blockers, run_state, view_of


def decide(plan: Plan, observed: Observed, now: float) -> Decision:
    """Say what to do now. The same plan, observation and time give the same decision.

    `now`: seconds since the epoch, by the clock that the times in `observed` come from. Call it whenever something has
    changed, and at `look_again_at`. A driver carries the actions out in order and may lose any of them: what is still
    needed is asked for again.
    """
    facts = survey(plan, observed)
    stops = _stops(facts, observed, now)
    look_ups = _look_ups(facts, observed)
    ready = _ready(facts, observed, now)
    starts = _starts(ready, facts, observed)
    outlook = Outlook(
        facts=facts,
        observed=observed,
        now=now,
        stopping=frozenset(stop.stage for stop in stops),
        starting=frozenset(start.stage for start in starts),
        asking=frozenset(look_up.stage for look_up in look_ups),
        blocked=blockers(facts),
    )
    state, message = run_state(outlook)
    actions: tuple[Action, ...] = (*stops, *look_ups, *starts)
    return Decision(
        actions=() if state in TERMINAL else actions,
        stages={name: view_of(name, outlook) for name in facts},
        state=state,
        message=message,
        look_again_at=None if state in TERMINAL else _look_again_at(facts, observed, now, stops),
    )


def _stops(facts: Mapping[str, StageFacts], observed: Observed, now: float) -> list[Stop]:
    """Return the living attempts that must end and are not ending yet, in the order of stages and attempts."""
    order = {name: place for place, name in enumerate(facts)}
    living = [attempt for attempt in observed.attempts if attempt.lives and not attempt.is_stopping]
    living.sort(key=lambda attempt: (order.get(attempt.stage, len(order)), attempt.stage, attempt.number))
    return [stop for attempt in living if (stop := _stop(attempt, facts, observed, now)) is not None]


def _stop(attempt: Attempt, facts: Mapping[str, StageFacts], observed: Observed, now: float) -> Stop | None:
    """Return the first reason to stop an attempt. What we asked for comes before what it did wrong."""
    stage = facts.get(attempt.stage)
    if stage is None:
        return stop_removed(attempt)
    return (
        stop_cancelled(attempt, observed.cancel)
        or stop_suspended(attempt, observed.suspend)
        or stop_unselected(attempt, observed.selected)
        or stop_superseded(attempt, stage.digest, inputs_change=not stage.unsettled)
        or stop_duplicate(attempt, newest=stage.newest)
        or overdue(attempt, stage.planned.stage.timeout_seconds, now)
    )


def _look_ups(facts: Mapping[str, StageFacts], observed: Observed) -> list[LookUp]:
    """Return the questions to the store that the selected stages depend on."""
    if observed.cancel:
        return []
    return [
        LookUp(name, stage.digest)
        for name, stage in facts.items()
        if stage.ask_store and stage.needed and stage.digest is not None
    ]


def _ready(facts: Mapping[str, StageFacts], observed: Observed, now: float) -> list[str]:
    """Return the stages that can be worked on now if there is room. None once a stage has failed.

    Two stages that ask for the same work have the same digest: one works, the other waits for its artifact.
    """
    if observed.cancel or observed.suspend or any(stage.failed for stage in facts.values()):
        return []
    in_work: set[str | None] = {attempt.digest for attempt in observed.attempts if attempt.lives}
    ready: list[str] = []
    for name, stage in facts.items():
        if stage.workable and now >= stage.verdict.not_before and stage.digest not in in_work:
            ready.append(name)
            in_work.add(stage.digest)
    return ready


def _starts(ready: Sequence[str], facts: Mapping[str, StageFacts], observed: Observed) -> list[Start]:
    living = [attempt.stage for attempt in observed.attempts if attempt.lives]
    ranks = {name: num_ranks(stage.planned.stage.resources) for name, stage in facts.items()}
    return [
        Start(name, digest, facts[name].newest + 1)
        for name in fitting(ready, living, ranks, observed.capacity)
        if (digest := facts[name].digest) is not None
    ]


def _look_again_at(
    facts: Mapping[str, StageFacts], observed: Observed, now: float, stops: Sequence[Stop]
) -> float | None:
    """Return the next moment at which time alone changes the decision: a back-off's end, a deadline."""
    stopped = {(stop.stage, stop.number) for stop in stops}
    moments = [
        deadline(attempt, stage.planned.stage.timeout_seconds)
        for stage in facts.values()
        for attempt in stage.living
        if (stage.name, attempt.number) not in stopped
    ]
    if not (observed.cancel or observed.suspend or any(stage.failed for stage in facts.values())):
        moments.extend(stage.verdict.not_before for stage in facts.values() if stage.workable)
    return min((moment for moment in moments if moment is not None and moment > now), default=None)
