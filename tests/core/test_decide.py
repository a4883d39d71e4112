"""The state machine, one sentence per case."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_core.decide import decide
from stagecoach_core.policies.selection import until
from stagecoach_core.values import (
    Action,
    Attempt,
    AttemptState,
    Capacity,
    Decision,
    Forgotten,
    Found,
    LookUp,
    Missing,
    Observed,
    Plan,
    RunState,
    StageState,
    Start,
    Stop,
    Wait,
    WaitKind,
)
from tests.core.makers import (
    attempt,
    chain,
    data_stage,
    digests_of,
    failed,
    found,
    look_ups,
    plan_for,
    plan_of,
    run_of,
    starts,
    stops,
)

CHAIN = chain("a", "b", "c")
DA, DB, DC = digests_of(CHAIN).values()
SIDES = plan_for(data_stage("a"), data_stage("b"), data_stage("c", "b"))
SA, SB, SC = digests_of(SIDES).values()
TWINS = plan_of(run_of(data_stage("a"), data_stage("b")), contents={"a.jsonl": "same", "b.jsonl": "same"})
TA, _ = digests_of(TWINS).values()
THREE = plan_for(data_stage("a"), data_stage("b"), data_stage("c"))
EA, EB, EC = digests_of(THREE).values()
NOW = 100.0


def missing(*digests: str, at: float = 0.0) -> dict[str, Found | Missing]:
    return {digest: Missing(at) for digest in digests}


def finished(*digests: str) -> dict[str, Found | Missing]:
    return {digest: found(digest) for digest in digests}


def done(stage: str, digest: str, number: int = 1, ended: float = 1.0) -> Attempt:
    return attempt(stage, digest, number, ended=ended)


def states(decision: Decision) -> str:
    return " ".join(view.state.value for view in decision.stages.values())


@dataclass(frozen=True)
class Case:
    """An observation, and the expected decision."""

    observed: Observed
    actions: tuple[Action, ...] = ()
    states: str = ""
    state: RunState = RunState.PROGRESSING
    waiting_for: dict[str, str] = field(default_factory=dict)
    plan: Plan = CHAIN


CASES = {
    "a new run asks the store first": Case(
        Observed(),
        (LookUp("a", DA),),
        "Pending Pending Pending",
        waiting_for={"a": f"the store's answer whether artifact {DA[:12]} exists", "b": "stage `a`", "c": "stage `b`"},
    ),
    "a stage without an artifact starts": Case(
        Observed(artifacts=missing(DA)),
        (Start("a", DA, 1),),
        "Pending Pending Pending",
        waiting_for={"a": "attempt 1 to start", "b": "stage `a`", "c": "stage `b`"},
    ),
    "a stage that starts or runs is left alone": Case(
        Observed(attempts=(attempt("a", DA, state=AttemptState.STARTING),), artifacts=missing(DA)),
        (),
        "Running Pending Pending",
    ),
    "after an attempt has ended the store is asked again": Case(
        Observed(attempts=(done("a", DA),), artifacts=missing(DA)), (LookUp("a", DA),), "Pending Pending Pending"
    ),
    "after a killed attempt too, because it may have published": Case(
        Observed(attempts=(failed("a", DA),), artifacts=missing(DA)), (LookUp("a", DA),), "Pending Pending Pending"
    ),
    "a stage whose artifact an attempt of this run made has succeeded, and the next follows": Case(
        Observed(attempts=(done("a", DA),), artifacts=finished(DA)), (LookUp("b", DB),), "Succeeded Pending Pending"
    ),
    "an artifact that a killed attempt had published counts": Case(
        Observed(attempts=(failed("a", DA),), artifacts=finished(DA)), (LookUp("b", DB),), "Succeeded Pending Pending"
    ),
    "an artifact that existed before is a cache hit": Case(
        Observed(artifacts={**finished(DA), **missing(DB)}), (Start("b", DB, 1),), "Cached Pending Pending"
    ),
    "an artifact of an earlier invocation is a cache hit": Case(
        Observed(attempts=(replace(done("a", DA), past=True),), artifacts=finished(DA, DB, DC)),
        (),
        "Cached Cached Cached",
        RunState.COMPLETE,
    ),
    "a run is complete when all is finished": Case(
        Observed(attempts=(done("c", DC),), artifacts=finished(DA, DB, DC)),
        (),
        "Cached Cached Succeeded",
        RunState.COMPLETE,
    ),
    "a run is not complete while an attempt is still ending": Case(
        Observed(attempts=(attempt("c", DC),), artifacts=finished(DA, DB, DC)),
        (),
        "Cached Cached Succeeded",
        waiting_for={"c": "attempt 1 to end"},
    ),
    "a failed attempt is retried after the back-off, with the next number": Case(
        Observed(attempts=(failed("a", DA, 3, ended=99.0),), artifacts=missing(DA, at=99.1)),
        (Start("a", DA, 4),),
        "Retrying Pending Pending",
    ),
    "before that it waits": Case(
        Observed(attempts=(failed("a", DA, 1, ended=99.5),), artifacts=missing(DA, at=99.6)),
        (),
        "Retrying Pending Pending",
        waiting_for={"a": "the back-off after attempt 1 to end"},
    ),
    "an artifact that is not in the store counts as lost": Case(
        Observed(attempts=(done("a", DA),), artifacts=missing(DA, at=2.0)),
        (Start("a", DA, 2),),
        "Retrying Pending Pending",
    ),
    "a user error fails the run, and stages that depend on it are skipped": Case(
        Observed(attempts=(failed("a", DA, cause=Cause.USER),), artifacts=missing(DA, at=2.0)),
        (),
        "Failed Skipped Skipped",
        RunState.FAILED,
    ),
    "requested again, a failed stage gets another attempt": Case(
        Observed(attempts=(failed("a", DA, cause=Cause.USER, past=True),), artifacts=missing(DA, at=2.0)),
        (Start("a", DA, 2),),
        "Pending Pending Pending",
    ),
    "failures at another digest are not charged, but the numbers continue": Case(
        Observed(attempts=(failed("a", "old", 7, cause=Cause.USER),), artifacts=missing(DA)),
        (Start("a", DA, 8),),
        "Pending Pending Pending",
    ),
    "independent stages start at the same time": Case(
        Observed(artifacts=missing(SA, SB)),
        (Start("a", SA, 1), Start("b", SB, 1)),
        "Pending Pending Pending",
        plan=SIDES,
    ),
    "as far as capacity allows": Case(
        Observed(artifacts=missing(SA, SB), capacity=Capacity(slots=1)),
        (Start("a", SA, 1),),
        "Pending Pending Pending",
        waiting_for={
            "a": "attempt 1 to start",
            "b": "capacity: this machine has 1 slot",
            "c": "stage `b`",
        },
        plan=SIDES,
    ),
    "of two stages with the same work one runs": Case(
        Observed(artifacts=missing(TA)),
        (Start("a", TA, 1),),
        "Pending Pending",
        waiting_for={"b": "stage `a`, which does the same work"},
        plan=TWINS,
    ),
    "and the other waits for its artifact": Case(
        Observed(attempts=(attempt("a", TA),), artifacts=missing(TA)),
        (),
        "Running Pending",
        waiting_for={"b": "stage `a`, which does the same work"},
        plan=TWINS,
    ),
    "an attempt that is stopping still occupies capacity": Case(
        Observed(
            attempts=(attempt("a", SA, state=AttemptState.STOPPING),),
            artifacts=missing(SA, SB),
            capacity=Capacity(slots=1),
        ),
        (),
        "Stopping Pending Pending",
        plan=SIDES,
    ),
    "when a stage fails, stages that run may finish": Case(
        Observed(attempts=(failed("a", SA, cause=Cause.USER), attempt("b", SB)), artifacts=missing(SA, SB, at=2.0)),
        (),
        "Failed Running Skipped",
        plan=SIDES,
    ),
    "but nothing new starts": Case(
        Observed(attempts=(failed("a", SA, cause=Cause.USER),), artifacts=missing(SA, SB, at=2.0)),
        (),
        "Failed Skipped Skipped",
        RunState.FAILED,
        plan=SIDES,
    ),
    "nor is anything tried again": Case(
        Observed(attempts=(failed("a", SA, cause=Cause.USER), failed("b", SB)), artifacts=missing(SA, SB, at=2.0)),
        (),
        "Failed Skipped Skipped",
        RunState.FAILED,
        plan=SIDES,
    ),
    "a failed run still reports what is cached": Case(
        Observed(attempts=(failed("a", SA, cause=Cause.USER),), artifacts=missing(SA, at=2.0)),
        (LookUp("b", SB),),
        "Failed Pending Pending",
        plan=SIDES,
    ),
    "even while something still runs": Case(
        Observed(attempts=(failed("a", EA, cause=Cause.USER), attempt("b", EB)), artifacts=missing(EA, EB, EC, at=2.0)),
        (),
        "Failed Running Skipped",
        plan=THREE,
    ),
    "while an attempt is live the store is not asked again": Case(
        Observed(attempts=(failed("a", DA, 1), attempt("a", DA, 2)), artifacts=missing(DA)),
        (),
        "Running Pending Pending",
    ),
    "suspended, a run stops its live attempts": Case(
        Observed(attempts=(attempt("a", DA),), artifacts=missing(DA), suspend=True),
        (Stop("a", 1, "the run is suspended"),),
        "Stopping Suspended Suspended",
    ),
    "but only once": Case(
        Observed(attempts=(attempt("a", DA, state=AttemptState.STOPPING),), artifacts=missing(DA), suspend=True),
        (),
        "Stopping Suspended Suspended",
    ),
    "without live attempts it is suspended": Case(
        Observed(attempts=(failed("a", DA, cause=Cause.PREEMPTION),), artifacts=missing(DA, at=1.1), suspend=True),
        (),
        "Suspended Suspended Suspended",
        RunState.SUSPENDED,
        waiting_for=dict.fromkeys("abc", "the run to be resumed"),
    ),
    "resumed, it continues with the next attempt": Case(
        Observed(attempts=(failed("a", DA, cause=Cause.PREEMPTION),), artifacts=missing(DA, at=1.1)),
        (Start("a", DA, 2),),
        "Retrying Pending Pending",
    ),
    "a finished run cannot be suspended": Case(
        Observed(artifacts=finished(DA, DB, DC), suspend=True), (), "Cached Cached Cached", RunState.COMPLETE
    ),
    "cancelled, a run stops its live attempts": Case(
        Observed(attempts=(attempt("b", DB),), artifacts={**finished(DA), **missing(DB)}, cancel=True),
        (Stop("b", 1, "the run is cancelled"),),
        "Cached Stopping Cancelled",
    ),
    "cancelled, the store is not asked again": Case(
        Observed(attempts=(attempt("a", SA),), artifacts=missing(SA), cancel=True),
        (Stop("a", 1, "the run is cancelled"),),
        "Stopping Cancelled Cancelled",
        plan=SIDES,
    ),
    "cancelled, what is finished stays finished": Case(
        Observed(
            attempts=(failed("b", DB, cause=Cause.PREEMPTION),),
            artifacts={**finished(DA), **missing(DB, at=2.0)},
            cancel=True,
        ),
        (),
        "Cached Cancelled Cancelled",
        RunState.CANCELLED,
    ),
    "a failed run stays failed when it is cancelled": Case(
        Observed(attempts=(failed("a", DA, cause=Cause.USER),), artifacts=missing(DA, at=2.0), cancel=True),
        (),
        "Failed Skipped Skipped",
        RunState.FAILED,
    ),
    "cancelled after it failed, a run reports the same of the stages it never started": Case(
        Observed(attempts=(failed("a", SA, cause=Cause.USER),), artifacts=missing(SA, SB, at=2.0), cancel=True),
        (),
        "Failed Skipped Skipped",
        RunState.FAILED,
        plan=SIDES,
    ),
    "an attempt at an older digest is stopped, and the next waits for its end": Case(
        Observed(attempts=(attempt("a", "old"),), artifacts=missing(DA)),
        (Stop("a", 1, "the stage's settings or inputs have changed"),),
        "Stopping Pending Pending",
    ),
    "an attempt whose input is re-created is stopped": Case(
        Observed(attempts=(attempt("b", DB),), artifacts=missing(DA)),
        (Stop("b", 1, "an input is being re-created"), Start("a", DA, 1)),
        "Pending Stopping Pending",
    ),
    "an attempt is left alone while the store has not answered about its input": Case(
        Observed(attempts=(attempt("b", DB),)), (LookUp("a", DA),), "Pending Running Pending"
    ),
    "an attempt of a stage that was removed is stopped": Case(
        Observed(attempts=(attempt("gone", "d"),), artifacts=finished(DA, DB, DC)),
        (Stop("gone", 1, "the run no longer has this stage"),),
        "Cached Cached Cached",
    ),
    "of two live attempts the older is stopped": Case(
        Observed(attempts=(attempt("a", DA, 1), attempt("a", DA, 2)), artifacts=missing(DA)),
        (Stop("a", 1, "attempt 2 of the stage replaces it"),),
        "Stopping Pending Pending",
    ),
    "a silent attempt is stopped as a hang": Case(
        Observed(attempts=(attempt("a", DA, heartbeat=-500.0, listening_since=-500.0),), artifacts=missing(DA)),
        (Stop("a", 1, "no heartbeat for 600 s; the limit is 600 s", Cause.HANG),),
        "Stopping Pending Pending",
    ),
    "a stage that is not selected is skipped": Case(
        Observed(artifacts=missing(DA), selected=until(CHAIN, "a")), (Start("a", DA, 1),), "Pending Skipped Skipped"
    ),
    "a run is complete when all that is selected is finished": Case(
        Observed(artifacts=finished(DA, DB), selected=until(CHAIN, "a")),
        (),
        "Cached Cached Skipped",
        RunState.COMPLETE,
    ),
    "a live attempt of a stage that is not selected is stopped": Case(
        Observed(attempts=(attempt("b", DB),), artifacts={**finished(DA), **missing(DB)}, selected=until(CHAIN, "a")),
        (Stop("b", 1, "the stage is not selected"),),
        "Cached Stopping Skipped",
    ),
    "an input that is not selected is looked up, and is enough if it is finished": Case(
        Observed(artifacts=finished(DA), selected=frozenset("c")), (LookUp("b", DB),), "Cached Pending Pending"
    ),
    "a selected stage whose input is neither finished nor selected fails the run": Case(
        Observed(artifacts=missing(DA), selected=frozenset("c")),
        (),
        "Skipped Skipped Skipped",
        RunState.FAILED,
    ),
    "an old failure of a stage that is not selected does not matter": Case(
        Observed(
            attempts=(failed("b", DB, cause=Cause.USER),),
            artifacts={**finished(DA), **missing(DB, at=2.0)},
            selected=until(CHAIN, "a"),
        ),
        (),
        "Cached Skipped Skipped",
        RunState.COMPLETE,
    ),
    "a forced stage runs though its artifact exists": Case(
        Observed(artifacts=finished(DA, DB, DC), forced={"b": 1}),
        (Start("b", DB, 1),),
        "Cached Pending Pending",
    ),
    "a forced stage has run once an attempt since then has succeeded": Case(
        Observed(
            attempts=(attempt("b", DB, 2, started=50.0, ended=60.0),),
            artifacts=finished(DA, DB, DC),
            forced={"b": 2},
        ),
        (),
        "Cached Succeeded Cached",
        RunState.COMPLETE,
    ),
    "an attempt from before does not count for a forced stage": Case(
        Observed(
            attempts=(attempt("b", DB, 2, started=50.0, ended=60.0),),
            artifacts=finished(DA, DB, DC),
            forced={"b": 3},
        ),
        (Start("b", DB, 3),),
        "Cached Pending Pending",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_decide(case: Case) -> None:
    decision = decide(case.plan, case.observed, NOW)
    assert decision.actions == case.actions
    assert states(decision) == case.states
    assert decision.state is case.state
    for name, waiting_for in case.waiting_for.items():
        assert decision.stages[name].waiting_for == waiting_for


def test_the_message_of_a_missed_gate_becomes_that_of_the_run() -> None:
    score = {"name": "score", "evaluate": {"model": {"uri": "m"}, "gates": [{"metric": "x", "atLeast": 0.8}]}}
    release = {"name": "release", "after": ["score"], "export": {"model": {"uri": "m"}}}
    plan = plan_for(score, release)
    digests = digests_of(plan)
    missed = failed("score", digests["score"], cause=Cause.USER, message="gate missed: x is 0.7, must be at least 0.8")
    artifacts = {**missing(digests["score"], at=2.0), **finished(digests["release"])}
    decision = decide(plan, Observed(attempts=(missed,), artifacts=artifacts), NOW)
    assert decision.state is RunState.FAILED
    assert decision.message == "stage `score` failed: gate missed: x is 0.7, must be at least 0.8"
    assert decision.stages["release"].state is StageState.SKIPPED, "not released though its artifact exists"
    assert decision.stages["release"].message == "stage `score` failed"


def test_a_stage_waits_for_those_it_comes_after_although_its_digest_is_known() -> None:
    plan = plan_for(data_stage("first"), data_stage("second", after=["first"]))
    digests = digests_of(plan)
    decision = decide(plan, Observed(artifacts=missing(*digests.values())), NOW)
    assert starts(decision) == ["first"]
    assert decision.stages["second"].waiting_for == "stage `first`"


def test_equal_content_of_a_stage_that_ran_again_keeps_later_stages_cached() -> None:
    before = plan_of(run_of(data_stage("a", seed=1), data_stage("b", "a")))
    after = plan_of(run_of(data_stage("a", seed=2), data_stage("b", "a")))
    old, new = digests_of(before), digests_of(after)
    assert old["a"] != new["a"]
    artifacts = {new["a"]: found(new["a"], found(old["a"]).content_digest), old["b"]: found(old["b"])}
    decision = decide(after, Observed(attempts=(done("a", new["a"]),), artifacts=artifacts), NOW)
    assert decision.state is RunState.COMPLETE
    assert states(decision) == "Succeeded Cached"


def test_the_next_decision_is_at_the_end_of_a_back_off_or_at_a_deadline() -> None:
    failure = failed("a", SA, 1, ended=99.5)
    beating = attempt("b", SB, heartbeat=99.0)
    observed = Observed(attempts=(failure, beating), artifacts=missing(SA, SB, at=99.6))
    assert decide(SIDES, observed, NOW).look_again_at == 100.5
    assert decide(SIDES, replace(observed, suspend=True), NOW).look_again_at is None
    assert decide(SIDES, replace(observed, attempts=(beating,)), NOW).look_again_at == 99.0 + 600.0


def test_stages_that_do_not_need_a_failed_one_go_on_if_the_run_says_so() -> None:
    """A grid of arms lost every arm because one failed."""
    lost = failed("b", SB, cause=Cause.USER)
    observed = Observed(attempts=(lost,), artifacts=missing(SA, SB, at=2.0), keep_going=True)
    assert starts(decide(SIDES, replace(observed, keep_going=False), NOW)) == []
    going = decide(SIDES, observed, NOW)
    assert (starts(going), going.state) == (["a"], RunState.PROGRESSING)
    assert states(going) == "Pending Failed Skipped"
    over = decide(SIDES, replace(observed, artifacts={**finished(SA), **missing(SB, at=2.0)}), NOW)
    assert (over.state, states(over)) == (RunState.FAILED, "Cached Failed Skipped")
    assert over.message == "stage `b` failed: failure 1; not run, because they need it: `c`"


def test_a_run_that_keeps_going_names_all_stages_that_failed() -> None:
    lost = tuple(failed(name, digest, cause=Cause.USER) for name, digest in (("a", EA), ("b", EB), ("c", EC)))
    observed = Observed(attempts=lost, artifacts=missing(EA, EB, EC, at=2.0), keep_going=True)
    decision = decide(THREE, observed, NOW)
    assert decision.state is RunState.FAILED
    assert [f"stage `{name}` failed" in decision.message for name in "abc"] == [True] * 3


def test_a_queues_time_does_not_count_as_running_time() -> None:
    """An hour of work, thirty hours preempted by Kueue and ten minutes of work exceeded 24 hours."""
    plan = plan_for(data_stage("a", timeoutSeconds=7200))
    digest = digests_of(plan)["a"]
    resumed = attempt("a", digest, started=0.0, running_since=110_000.0, ran_before=3600.0, heartbeat=113_500.0)
    observed = Observed(attempts=(resumed,), artifacts=missing(digest))
    assert decide(plan, observed, 113_599.0).look_again_at == 113_600.0
    assert not stops(decide(plan, observed, 113_599.0))
    assert [stop.cause for stop in stops(decide(plan, observed, 113_600.0))] == [Cause.USER]


def test_an_attempt_that_cannot_start_is_stopped_at_its_deadline() -> None:
    plan = plan_for(data_stage("a", deadlines={"imageSeconds": 60}))
    digest = digests_of(plan)["a"]
    wait = Wait(WaitKind.IMAGE, 40.0, "ImageUnavailable", "no such image")
    observed = Observed(
        attempts=(attempt("a", digest, state=AttemptState.STARTING, wait=wait),), artifacts=missing(digest)
    )
    assert decide(plan, observed, 99.0).look_again_at == 100.0
    (stop,) = stops(decide(plan, observed, 100.0))
    assert stop.reason == "it did not start within `deadlines.imageSeconds` (60): no such image"


def test_restarts_are_counted_by_cause_and_the_last_message_is_reported() -> None:
    attempts = (failed("a", DA, 1), failed("a", DA, 2, Cause.PREEMPTION), failed("a", DA, 3, Cause.HANG, ended=9.0))
    view = decide(CHAIN, Observed(attempts=attempts, artifacts=missing(DA, at=9.1)), NOW).stages["a"]
    assert view.restarts == {Cause.INFRASTRUCTURE: 1, Cause.PREEMPTION: 1, Cause.HANG: 1}
    assert (view.attempt, view.message) == (3, "failure 3")


def test_a_digest_is_reported_as_soon_as_all_inputs_are_finished() -> None:
    decision = decide(CHAIN, Observed(artifacts=finished(DA)), NOW)
    assert [view.digest for view in decision.stages.values()] == [DA, DB, None]
    assert decision.stages["a"].artifact == found(DA)
    assert look_ups(decision) == ["b"]
    assert not stops(decision)


def test_a_budget_survives_a_bounded_history() -> None:
    """A driver that stores only the newest attempts reports how many came before; a new request clears them."""
    plan = chain("a")
    digest = digests_of(plan)["a"]
    observed = Observed(
        attempts=(failed("a", digest, 21, ended=50.0),),
        artifacts={digest: Missing(at=60.0)},
        forgotten={("a", digest): (Forgotten({Cause.INFRASTRUCTURE: 20}, until=40.0),)},
    )
    view = decide(plan, observed, now=100.0).stages["a"]
    assert (view.state, dict(view.restarts)) == (StageState.FAILED, {Cause.INFRASTRUCTURE: 21})
    again = decide(plan, replace(observed, forgotten={}), now=400.0)
    assert starts(again) == ["a"]
    assert dict(again.stages["a"].restarts) == {Cause.INFRASTRUCTURE: 1}
