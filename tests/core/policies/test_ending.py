"""The cause that the end of an attempt is charged to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.outcomes import OUT_OF_MEMORY_FAULT, AttemptResult, Cause, ExitCode, process_fault
from stagecoach_core.policies.ending import AttemptEnd, cause_of_end, end_of_attempt
from stagecoach_core.values import Attempt
from tests.core.makers import attempt

DONE = AttemptResult(exit_code=0)
INTERRUPTED = AttemptResult(exit_code=75, cause=Cause.PREEMPTION)
ERROR = AttemptResult(exit_code=64, cause=Cause.USER)
STORAGE = AttemptResult(exit_code=74, cause=Cause.INFRASTRUCTURE)


@pytest.mark.parametrize(
    ("stopped_for", "result", "cause"),
    [
        pytest.param(None, DONE, None, id="success"),
        pytest.param(Cause.HANG, DONE, None, id="success counts although it was asked to stop"),
        pytest.param(None, None, Cause.INFRASTRUCTURE, id="without a result it was killed"),
        pytest.param(None, STORAGE, Cause.INFRASTRUCTURE, id="the cause in the result"),
        pytest.param(None, ERROR, Cause.USER, id="a user error"),
        pytest.param(None, INTERRUPTED, Cause.PREEMPTION, id="stopped from outside"),
        pytest.param(Cause.PREEMPTION, INTERRUPTED, Cause.PREEMPTION, id="suspended, and it saved"),
        pytest.param(Cause.PREEMPTION, None, Cause.PREEMPTION, id="suspended, and killed because it did not end"),
        pytest.param(Cause.HANG, None, Cause.HANG, id="a hang, killed"),
        pytest.param(Cause.HANG, INTERRUPTED, Cause.HANG, id="a hang that still exited cleanly"),
        pytest.param(Cause.USER, INTERRUPTED, Cause.USER, id="over its time limit, and it saved"),
        pytest.param(Cause.PREEMPTION, ERROR, Cause.USER, id="a user error while being suspended"),
    ],
)
def test_cause_of_an_end(stopped_for: Cause | None, result: AttemptResult | None, cause: Cause | None) -> None:
    assert cause_of_end(stopped_for, result) is cause


# -- errors that recur -------------------------------------------------------------------------------------------------

BUG, OTHER = "RuntimeError at loop.py:180 in step", "ValueError at load.py:12 in load"
FAULTS = (None, BUG, OTHER)


def unnamed(fault: str | None, step: int | None = None, cause: Cause = Cause.INFRASTRUCTURE) -> AttemptResult:
    return AttemptResult(exit_code=1, cause=cause, message="it broke", last_step=step, fault=fault)


def ends_of(*results: AttemptResult | None, stops: Sequence[Cause | None] = ()) -> list[AttemptEnd]:
    """Return what a driver records of consecutive attempts."""
    earlier: list[Attempt] = []
    ends = []
    for number, result in enumerate(results, start=1):
        stop = stops[number - 1] if stops else None
        ends.append(end_of_attempt(stop, result, earlier, number))
        fields = {} if result is None else {"fault": result.fault or "", "last_step": result.last_step}
        earlier.append(attempt("a", "d", number, ended=float(number), cause=ends[-1].cause, **fields))
    return ends


def causes(*results: AttemptResult | None) -> list[Cause | None]:
    return [end.cause for end in ends_of(*results)]


def test_an_error_that_recurs_is_the_users_at_its_second_time() -> None:
    """A RuntimeError of a model, and a TypeError of a tokenizer, were tried 20 times in an hour."""
    first, second = ends_of(unnamed(BUG, 10), unnamed(BUG, 10))
    assert (first.cause, second.cause) == (Cause.INFRASTRUCTURE, Cause.USER)
    assert first.message == "it broke"
    assert second.message == (
        "attempts 1 and 2 ended with the same error at the same place, without a new checkpoint in between, so the "
        "next one would too: it broke"
    )


def test_a_new_checkpoint_in_between_shows_that_another_attempt_helps() -> None:
    assert causes(unnamed(BUG, 10), unnamed(BUG, 20))[-1] is Cause.INFRASTRUCTURE
    assert causes(unnamed(BUG), unnamed(BUG, 10))[-1] is Cause.INFRASTRUCTURE
    assert causes(unnamed(BUG, 10), unnamed(OTHER, 20), unnamed(BUG, 20))[-1] is Cause.INFRASTRUCTURE
    assert causes(unnamed(BUG, 20), unnamed(OTHER, 10), unnamed(BUG, 10))[-1] is Cause.USER


OOM = AttemptResult(exit_code=-9, cause=Cause.INFRASTRUCTURE, message="OOMKilled", fault=OUT_OF_MEMORY_FAULT)


def test_running_out_of_memory_again_and_again_is_the_users_at_its_third_time() -> None:
    """A deterministic one was tried 21 times."""
    ends = ends_of(OOM, OOM, OOM)
    assert [end.cause for end in ends] == [Cause.INFRASTRUCTURE, Cause.INFRASTRUCTURE, Cause.USER]
    assert ends[-1].message.startswith("attempts 1, 2 and 3 ended in the same way, without a new checkpoint in between")
    assert causes(OOM, OOM, OOM.model_copy(update={"last_step": 5}))[-1] is Cause.INFRASTRUCTURE
    assert causes(OOM, None, OOM, INTERRUPTED, OOM)[-1] is Cause.USER


def test_an_exit_code_that_says_nothing_may_recur_and_a_signal_may_not() -> None:
    assert process_fault(127) == "process: exit code 127"
    assert [process_fault(code) for code in (0, -9, int(ExitCode.STORAGE))] == [None, None, None]


def test_what_happens_in_between_does_not_hide_a_recurrence() -> None:
    assert causes(unnamed(BUG, 10), None, INTERRUPTED, STORAGE, unnamed(BUG, 10))[-1] is Cause.USER


def test_infrastructure_stays_infrastructure_however_often_it_fails() -> None:
    killed = AttemptResult(exit_code=-9, cause=Cause.INFRASTRUCTURE, message="killed by signal 9")
    for result in (None, killed, STORAGE, unnamed(None)):
        assert causes(*[result] * 20) == [Cause.INFRASTRUCTURE] * 20


def test_an_attempt_that_was_stopped_is_not_charged_for_its_error() -> None:
    ends = ends_of(unnamed(BUG), unnamed(BUG), stops=(None, Cause.PREEMPTION))
    assert ends[-1].cause is Cause.PREEMPTION


@given(
    st.lists(
        st.tuples(
            st.sampled_from(FAULTS),
            st.one_of(st.none(), st.integers(0, 3)),
            st.sampled_from((Cause.INFRASTRUCTURE, Cause.INFRASTRUCTURE, Cause.PREEMPTION, Cause.USER)),
        ),
        max_size=8,
    )
)
def test_any_sequence_of_attempts_is_charged_as_defined(
    attempts: list[tuple[str | None, int | None, Cause]],
) -> None:
    """Oracle: the definition, spelled out over all pairs of attempts."""
    found = causes(*(unnamed(fault, step, cause) for fault, step, cause in attempts))
    for index, (fault, _, own) in enumerate(attempts):
        newest = [max((step for _, step, _ in attempts[: end + 1] if step is not None), default=-1) for end in range(8)]
        recurs = any(
            attempts[before][0] == fault and attempts[before][2] is not Cause.PREEMPTION
            and newest[before] == newest[index]
            for before in range(index)
        )  # fmt: skip
        charged = own is Cause.INFRASTRUCTURE and fault is not None and recurs
        assert found[index] is (Cause.USER if charged else own)
