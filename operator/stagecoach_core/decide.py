"""The state machine: from a plan and an observation to the actions to take. Pure; the time is an argument.

It is level-triggered, as Kubernetes controllers are: no state is kept between two calls, and everything follows from
what is observed now. So a driver may crash, lose an action or be late without harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stagecoach_core.facts import StageFacts, stage_facts
from stagecoach_core.policies.capacity import num_ranks, select_fitting
from stagecoach_core.policies.stopping import (
    stop_cancelled,
    stop_duplicate,
    stop_removed,
    stop_superseded,
    stop_suspended,
    stop_unselected,
)
from stagecoach_core.policies.timeout import deadline, limits_of, stop_overdue
from stagecoach_core.policies.waiting import stop_waiting, wait_ends
from stagecoach_core.values import Action, Attempt, Decision, LookUp, Observed, Plan, Start, Stop
from stagecoach_core.views import TERMINAL, DecisionContext, blocked_stages, run_state, view_of


def decide(plan: Plan, observed: Observed, now: float) -> Decision:
    """Decide what to do now. The same plan, observation and time give the same decision.

    `now`: seconds since the epoch, by the same clock as the times in `observed`. To be called whenever something has
    changed, and at `look_again_at`. A driver carries out the actions in order and may lose any of them: the next
    decision contains those that are still needed.
    """
    facts = stage_facts(plan, observed, now)
    stops = _stops(facts, observed, now)
    look_ups = _look_ups(facts, observed)
    ready = _ready(facts, observed, now)
    starts = _starts(ready, facts, observed)
    context = DecisionContext(
        facts=facts,
        observed=observed,
        now=now,
        stopping=frozenset(stop.stage for stop in stops),
        starting=frozenset(start.stage for start in starts),
        looking_up=frozenset(look_up.stage for look_up in look_ups),
        blocked=blocked_stages(facts),
    )
    state, message = run_state(context)
    actions: tuple[Action, ...] = (*stops, *look_ups, *starts)
    return Decision(
        actions=() if state in TERMINAL else actions,
        stages={name: view_of(name, context) for name in facts},
        state=state,
        message=message,
        look_again_at=None if state in TERMINAL else _look_again_at(facts, observed, now, stops),
    )


def _stops(facts: Mapping[str, StageFacts], observed: Observed, now: float) -> list[Stop]:
    """Return the orders to stop live attempts that are not stopping yet, in the order of stages and attempts."""
    order = {name: index for index, name in enumerate(facts)}
    live = [attempt for attempt in observed.attempts if attempt.is_live and not attempt.is_stopping]
    # A stage that was removed from the run has no place in the order: it comes last.
    live.sort(key=lambda attempt: (order.get(attempt.stage, len(order)), attempt.stage, attempt.number))
    return [stop for attempt in live if (stop := _stop(attempt, facts, observed, now)) is not None]


def _stop(attempt: Attempt, facts: Mapping[str, StageFacts], observed: Observed, now: float) -> Stop | None:
    """Return the order to stop an attempt for the first reason that applies, None if there is none.

    Requests come before faults: an attempt of a suspended run that also hangs is not charged for the hang.
    """
    stage = facts.get(attempt.stage)
    if stage is None:
        return stop_removed(attempt)
    return (
        stop_cancelled(attempt, observed.cancel)
        or stop_suspended(attempt, observed.suspend)
        or stop_unselected(attempt, observed.selected)
        or stop_superseded(attempt, stage.digest, inputs_change=not stage.undetermined)
        or stop_duplicate(attempt, newest=stage.newest)
        or stop_waiting(attempt, stage.planned.stage.deadlines, now)
        or stop_overdue(attempt, stage.planned.stage.timeout_seconds, now, limits_of(stage.planned.stage.deadlines))
    )


def _look_ups(facts: Mapping[str, StageFacts], observed: Observed) -> list[LookUp]:
    """Return the look-ups in the store that the selected stages need."""
    if observed.cancel:
        return []  # nothing will start, so the answers would change nothing
    return [
        LookUp(name, stage.digest)
        for name, stage in facts.items()
        if stage.needs_look_up and stage.needed and stage.digest is not None
    ]


def _ready(facts: Mapping[str, StageFacts], observed: Observed, now: float) -> list[str]:
    """Return the stages that can start now if capacity allows.

    No stage starts once one has failed, unless the run is to keep going. Two stages with equal digests are the same
    work: one runs, the other waits for its artifact.
    """
    if not _may_start(facts, observed):
        return []
    # Digests, not stages: an attempt of another stage, or of one that was removed, may be doing the same work.
    in_work: set[str | None] = {attempt.digest for attempt in observed.attempts if attempt.is_live}
    ready: list[str] = []
    for name, stage in facts.items():
        if stage.startable and now >= stage.retry.not_before and stage.digest not in in_work:
            ready.append(name)
            in_work.add(stage.digest)
    return ready


def _may_start(facts: Mapping[str, StageFacts], observed: Observed) -> bool:
    if observed.cancel or observed.suspend:
        return False
    return observed.keep_going or not any(stage.failed for stage in facts.values())


def _starts(ready: Sequence[str], facts: Mapping[str, StageFacts], observed: Observed) -> list[Start]:
    # Attempts that are stopping still occupy their slot and ranks.
    occupying = [attempt.stage for attempt in observed.attempts if attempt.is_live]
    ranks = {name: num_ranks(stage.planned.stage.resources) for name, stage in facts.items()}
    return [
        Start(name, digest, facts[name].newest + 1)
        for name in select_fitting(ready, occupying, ranks, observed.capacity)
        if (digest := facts[name].digest) is not None
    ]


def _look_again_at(
    facts: Mapping[str, StageFacts], observed: Observed, now: float, stops: Sequence[Stop]
) -> float | None:
    """Return the next time at which the decision changes though nothing happens: the end of a back-off, a deadline."""
    stopped = {(stop.stage, stop.number) for stop in stops}
    times = [
        moment
        for stage in facts.values()
        for attempt in stage.live_attempts
        if (stage.name, attempt.number) not in stopped and not attempt.is_stopping
        for moment in (
            deadline(attempt, stage.planned.stage.timeout_seconds, limits_of(stage.planned.stage.deadlines)),
            wait_ends(attempt, stage.planned.stage.deadlines),
        )
    ]
    # The end of a back-off matters only if a stage may start then (see `_ready`).
    if _may_start(facts, observed):
        times.extend(stage.retry.not_before for stage in facts.values() if stage.startable)
    times.extend(stage.claim.look_again_at for stage in facts.values() if stage.claim is not None and stage.needed)
    return min((time for time in times if time is not None and time > now), default=None)
