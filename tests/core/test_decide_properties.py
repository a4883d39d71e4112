"""Properties of the state machine under any run and any order of events.

A simulator plays the driver and the world: it carries out decisions late or not at all, attempts start, run, die, hang
or finish in any order, the store answers at any time, the user suspends, resumes and cancels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagecoach_api.outcomes import Cause
from stagecoach_core.decide import decide
from stagecoach_core.graph import ancestors
from stagecoach_core.policies.retry import budget
from stagecoach_core.policies.timeout import DEFAULT_LIMITS
from stagecoach_core.values import (
    Action,
    Attempt,
    AttemptState,
    Capacity,
    Decision,
    Found,
    LookUp,
    Missing,
    Observed,
    Plan,
    RunState,
    StageState,
    Start,
    Stop,
)
from tests.core.makers import data_stage, digests_of, found, plan_of, run_of

pytestmark = pytest.mark.slow

TERMINAL = {RunState.COMPLETE, RunState.FAILED, RunState.CANCELLED}
ENDED = {StageState.SUCCEEDED, StageState.CACHED, StageState.FAILED, StageState.CANCELLED, StageState.SKIPPED}
BUDGETS = {"infrastructure": 2, "hang": 1, "user": 0}
PROFILE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
Key = tuple[str, int]


@dataclass
class World:
    """A driver's environment. `published` is the truth; `observed` is what the driver has seen of it."""

    plan: Plan
    observed: Observed
    now: float = 1000.0
    published: set[str] = field(default_factory=set)
    stop_causes: dict[Key, Cause] = field(default_factory=dict)
    started: Counter[str] = field(default_factory=Counter)
    """Attempts by digest."""
    finished: dict[str, str] = field(default_factory=dict)
    """Digest of every stage that was observed as finished."""

    # -- what the driver does ------------------------------------------------------------------------------------------

    def decide(self) -> Decision:
        decision = decide(self.plan, self.observed, self.now)
        assert decide(self.plan, self.observed, self.now) == decision, "the same observation, the same decision"
        check(self, decision)
        return decision

    def carry_out(self, action: Action) -> None:
        self.now += 0.001
        match action:
            case LookUp():
                answer = found(action.digest) if action.digest in self.published else Missing(self.now)
                self.know(artifacts={**self.observed.artifacts, action.digest: answer})
            case Start():
                assert not [item for item in self.live if item.stage == action.stage], "never two at once"
                numbers = [item.number for item in self.observed.attempts if item.stage == action.stage]
                assert action.number > max(numbers, default=0), "numbers only grow"
                self.started[action.digest] += 1
                new = Attempt(action.stage, action.digest, action.number, AttemptState.STARTING, self.now)
                self.know(attempts=(*self.observed.attempts, new))
            case Stop():
                attempt = self.attempt((action.stage, action.number))
                if attempt.is_live:
                    self.stop_causes[action.stage, action.number] = action.cause
                    self.change(attempt, state=AttemptState.STOPPING, cause=action.cause)

    # -- what happens --------------------------------------------------------------------------------------------------

    @property
    def live(self) -> list[Attempt]:
        return [item for item in self.observed.attempts if item.is_live]

    def attempt(self, key: Key) -> Attempt:
        return next(item for item in self.observed.attempts if (item.stage, item.number) == key)

    def know(self, **fields: Any) -> None:
        self.observed = replace(self.observed, **fields)

    def change(self, attempt: Attempt, **fields: Any) -> None:
        changed = replace(attempt, **fields)
        self.know(attempts=tuple(changed if item is attempt else item for item in self.observed.attempts))

    def end(self, attempt: Attempt, cause: Cause | None, publishes: bool) -> None:
        if publishes:
            self.published.add(attempt.digest)
        stopped_for = self.stop_causes.get((attempt.stage, attempt.number))
        cause = stopped_for if cause is not None and stopped_for is not None else cause
        self.change(attempt, state=AttemptState.ENDED, ended=self.now, cause=cause, message="it ended")


def check(world: World, decision: Decision) -> None:
    """Check the invariants of every decision."""
    starts = {action.stage: action for action in decision.actions if isinstance(action, Start)}
    assert not starts or StageState.FAILED not in {view.state for view in decision.stages.values()}
    for name, view in decision.stages.items():
        if view.artifact is not None and view.digest is not None:
            world.finished[name] = view.digest
        if name in starts:
            assert world.finished.get(name) != starts[name].digest, "a finished stage never runs again"
            assert view.state not in ENDED
        charged = charged_failures(world, view.digest)
        for cause, failures in charged.items():
            assert failures <= budget(cause, world.plan.stages[name].stage.retries) + 1, "budgets never grow"
        if name in starts:
            spent = [cause for cause, n in charged.items() if n > budget(cause, world.plan.stages[name].stage.retries)]
            assert not spent, "a spent budget starts nothing"
    if decision.state in TERMINAL:
        assert not world.live, "no attempt is live in a terminal state"
        assert not decision.actions
        assert all(view.state in ENDED for view in decision.stages.values())
    else:
        waits_for_a_named_thing(world, decision)


def charged_failures(world: World, digest: str | None) -> Counter[Cause]:
    """Oracle: failures by cause at a digest, counted independently. A lost result counts as infrastructure."""
    ended = [item for item in world.observed.attempts if not item.is_live and item.digest == digest]
    causes = [item.cause or Cause.INFRASTRUCTURE for item in ended if item.cause or digest not in world.published]
    return Counter(cause for cause in causes if cause is not Cause.PREEMPTION)


def waits_for_a_named_thing(world: World, decision: Decision) -> None:
    for view in decision.stages.values():
        moves = view.state in {StageState.RUNNING, StageState.STOPPING}
        assert view.state in ENDED or moves or view.waiting_for, "a stage that waits reports what it waits for"
    suspended = decision.state is RunState.SUSPENDED
    timed = decision.look_again_at is not None and decision.look_again_at > world.now
    assert decision.actions or world.live or suspended or timed, "a run always waits for something"


# -- runs and events ---------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = [f"s{number}" for number in range(draw(st.integers(1, 5)))]
    stages = []
    for place, name in enumerate(names):
        inputs = draw(st.lists(st.sampled_from(names[:place]), unique=True)) if place else []
        after = draw(st.lists(st.sampled_from(names[:place]), unique=True, max_size=1)) if place else []
        ranks = draw(st.integers(1, 3))
        stages.append(data_stage(name, *inputs, after=after, resources={"ranksPerNode": ranks}, retries=BUDGETS))
    return plan_of(run_of(*draw(st.permutations(stages))))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    plan = draw(plans())
    names = list(plan.stages)
    digests = digests_of(plan)
    known = draw(st.sets(st.sampled_from(names)))
    capacity = Capacity(draw(st.none() | st.integers(1, 3)), draw(st.none() | st.integers(1, 4)))
    observed = Observed(
        capacity=capacity,
        selected=draw(st.none() | st.sets(st.sampled_from(names), min_size=1).map(frozenset)),
        forced=dict.fromkeys(draw(st.sets(st.sampled_from(names), max_size=1)), 1),
        keep_going=draw(st.booleans()),
    )
    return World(plan, observed, published={digests[name] for name in known})


CAUSES = st.sampled_from([Cause.INFRASTRUCTURE, Cause.INFRASTRUCTURE, Cause.HANG, Cause.USER, Cause.PREEMPTION])


def something_happens(world: World, data: st.DataObject, decision: Decision) -> None:
    """One event: an action is carried out, an attempt changes, time passes, or the user requests something."""
    events = ["time", "user"] + ["act"] * 4 * bool(decision.actions) + ["attempt"] * 3 * bool(world.live)
    match data.draw(st.sampled_from(events), label="event"):
        case "act":
            world.carry_out(data.draw(st.sampled_from(decision.actions), label="action"))
        case "attempt":
            attempt_moves(world, data, data.draw(st.sampled_from(world.live), label="attempt"))
        case "time":
            world.now += data.draw(st.sampled_from([0.5, 5.0, 400.0, 2000.0]), label="seconds")
        case "user":
            request = data.draw(st.sampled_from(["suspend", "resume", "resume", "resume", "cancel"]), label="request")
            # A cancellation is not revoked; one in five walks has one.
            if request == "cancel" and data.draw(st.integers(0, 4), label="really") == 0:
                world.know(cancel=True)
            world.know(suspend=request == "suspend")


def attempt_moves(world: World, data: st.DataObject, attempt: Attempt) -> None:
    moves = ["done", "lost", "die", "die after publishing", "beat"]
    match data.draw(st.sampled_from(moves), label="move"):
        case "done":
            world.end(attempt, None, publishes=True)
        case "lost":
            world.end(attempt, None, publishes=False)
        case "die":
            world.end(attempt, data.draw(CAUSES, label="cause"), publishes=False)
        case "die after publishing":
            world.end(attempt, Cause.INFRASTRUCTURE, publishes=True)
        case "beat" if attempt.state is not AttemptState.STOPPING:
            world.change(attempt, state=AttemptState.RUNNING, running_since=attempt.started, heartbeat=world.now)


def play_to_the_end(world: World) -> Decision:
    """Continue without trouble: actions are carried out, attempts finish, time passes. Return the last decision."""
    for _ in range(400):
        decision = world.decide()
        if decision.state in TERMINAL:
            return decision
        if decision.state is RunState.SUSPENDED and not decision.actions:
            world.know(suspend=False)
            continue
        for action in decision.actions:
            world.carry_out(action)
        if not decision.actions and world.live:
            world.end(world.live[0], None, publishes=True)
        elif not decision.actions and decision.look_again_at is not None:
            world.now = max(world.now, decision.look_again_at)
    raise AssertionError("the run does not end")


@given(world=worlds(), data=st.data())
@settings(PROFILE, max_examples=100)
def test_any_run_ends_after_any_events_and_keeps_the_invariants(world: World, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 30), label="events")):
        decision = world.decide()
        if decision.state in TERMINAL:
            break
        something_happens(world, data, decision)
    last = play_to_the_end(world)
    if last.state is RunState.COMPLETE:
        selected = world.observed.selected or frozenset(world.plan.stages)
        assert selected <= {name for name, view in last.stages.items() if view.artifact is not None}
    if last.state is RunState.CANCELLED:
        assert world.observed.cancel
    if last.state is RunState.FAILED:
        assert last.message


@given(world=worlds(), data=st.data())
@settings(PROFILE, max_examples=60)
def test_a_terminal_state_is_final_whatever_is_requested_afterwards(world: World, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 15), label="events")):
        something_happens(world, data, world.decide())
    last = play_to_the_end(world)
    world.now += 10_000.0
    world.know(suspend=data.draw(st.booleans()), cancel=world.observed.cancel or data.draw(st.booleans()))
    again = world.decide()
    assert again.state is last.state
    assert again.stages == last.stages


@given(plan=plans(), order=st.randoms(use_true_random=False))
@settings(PROFILE, max_examples=60)
def test_without_trouble_each_stage_runs_exactly_once_after_its_inputs(plan: Plan, order: Any) -> None:
    world = World(plan, Observed())
    while (decision := world.decide()).state is not RunState.COMPLETE:
        finished = {name for name, view in decision.stages.items() if view.artifact is not None}
        for action in decision.actions:
            if isinstance(action, Start):
                assert set(plan.stages[action.stage].upstream) <= finished
            world.carry_out(action)
        if not decision.actions:
            world.end(order.choice(world.live), None, publishes=True)
    # Stages with the same work share a digest, and it is done once.
    assert world.started == Counter(set(digests_of(plan).values()))


@given(plan=plans())
@settings(PROFILE, max_examples=30)
def test_a_silent_attempt_is_never_waited_for_longer_than_the_limit(plan: Plan) -> None:
    world = World(plan, Observed(capacity=Capacity(slots=1)))
    while not world.live:
        for action in world.decide().actions:
            world.carry_out(action)
    attempt = world.live[0]
    world.change(attempt, state=AttemptState.RUNNING, running_since=world.now)
    decision = world.decide()
    assert decision.look_again_at == world.now + DEFAULT_LIMITS.start_seconds
    world.now = decision.look_again_at
    assert [item.cause for item in world.decide().actions if isinstance(item, Stop)] == [Cause.HANG]


# -- digests -----------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Stages as (file they read, indices of the stages they read)."""
    number = draw(st.integers(1, 5))
    places = [draw(st.lists(st.sampled_from(range(place)), unique=True)) if place else [] for place in range(number)]
    return [(f"file{place}.jsonl", inputs) for place, inputs in enumerate(places)]


def built(layout: list[tuple[str, list[int]]], prefix: str, changes: dict[int, dict[str, Any]], **spec: Any) -> Any:
    """A run of `data` stages; `changes`: fields of single stages, by index; those of `data` are merged."""
    stages = []
    for place, (file, inputs) in enumerate(layout):
        change = dict(changes.get(place, {}))
        sources = [{"uri": file}, *({"stage": f"{prefix}{item}"} for item in inputs)]
        stages.append({"name": f"{prefix}{place}", "data": {"sources": sources, **change.pop("data", {})}, **change})
    return run_of(*stages, **spec)


@given(layout=layouts(), data=st.data())
@settings(PROFILE, max_examples=40)
def test_names_resources_queues_and_retries_change_no_digest(
    layout: list[tuple[str, list[int]]], data: st.DataObject
) -> None:
    settings_of = st.fixed_dictionaries(
        {},
        optional={
            "resources": st.fixed_dictionaries({"nodes": st.integers(1, 9), "gpusPerNode": st.integers(0, 8)}),
            "queue": st.just({"name": "research"}),
            "retries": st.fixed_dictionaries({"user": st.integers(0, 9)}),
            "timeoutSeconds": st.integers(1, 99),
        },
    )
    changes = {place: data.draw(settings_of) for place in range(len(layout))}
    before = digests_of(plan_of(built(layout, "s", {})))
    after = digests_of(plan_of(built(layout, "renamed", changes, name="other", defaults=data.draw(settings_of))))
    by_place = {int(name.removeprefix("renamed")): digest for name, digest in after.items()}
    assert by_place == {int(name.removeprefix("s")): digest for name, digest in before.items()}


@given(layout=layouts(), data=st.data())
@settings(PROFILE, max_examples=40)
def test_a_change_of_one_stage_changes_it_and_its_descendants_only(
    layout: list[tuple[str, list[int]]], data: st.DataObject
) -> None:
    changed = data.draw(st.integers(0, len(layout) - 1), label="changed stage")
    plain = plan_of(built(layout, "s", {}))
    if data.draw(st.booleans(), label="configuration rather than content"):
        edited = plan_of(built(layout, "s", {changed: {"data": {"heldOutShare": 0.5}}}))
    else:
        edited = plan_of(built(layout, "s", {}), contents={layout[changed][0]: "one other byte"})
    before, after = digests_of(plain), digests_of(edited)
    upstream = {name: planned.upstream for name, planned in plain.stages.items()}
    touched = {name for name in before if f"s{changed}" in {name, *ancestors([name], upstream)}}
    assert {name for name in before if before[name] != after[name]} == touched


@given(world=worlds(), data=st.data())
@settings(PROFILE, max_examples=60)
def test_an_edit_during_a_run_leaves_no_attempt_at_the_old_digest(world: World, data: st.DataObject) -> None:
    world.know(forced={}, selected=None)
    for _ in range(data.draw(st.integers(0, 15), label="events")):
        something_happens(world, data, world.decide())
    world.plan = replace(world.plan, code="new code")
    world.know(suspend=False, cancel=False)
    world.finished.clear()
    last = play_to_the_end(world)
    if last.state is RunState.COMPLETE:
        assert {name: view.digest for name, view in last.stages.items()} == digests_of(world.plan)
        made: set[str] = set(digests_of(world.plan).values())
        assert all(isinstance(world.observed.artifacts[digest], Found) for digest in made)
    else:
        assert last.state is RunState.FAILED
