"""Retry budgets and back-off."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Retries
from stagecoach_core.policies.retry import backoff_seconds, decide_retry, without_result
from stagecoach_core.values import Attempt, Forgotten
from tests.core.makers import attempt, failed

D = "digest"


def failures(*causes: Cause) -> list[Attempt]:
    return [failed("a", D, number, cause, ended=float(number)) for number, cause in enumerate(causes, start=1)]


@pytest.mark.parametrize(
    ("cause", "allowed"), [(Cause.INFRASTRUCTURE, 20), (Cause.HANG, 5), (Cause.USER, 0)], ids=lambda value: str(value)
)
def test_every_cause_has_a_budget_of_its_own(cause: Cause, allowed: int) -> None:
    assert decide_retry(failures(*[cause] * allowed), Retries()).exhausted is None
    assert decide_retry(failures(*[cause] * (allowed + 1)), Retries()).exhausted is cause


def test_a_budget_that_is_set_counts_even_if_zero() -> None:
    retries = Retries(infrastructure=0, user=1)
    assert decide_retry(failures(Cause.INFRASTRUCTURE), retries).exhausted is Cause.INFRASTRUCTURE
    assert decide_retry(failures(Cause.USER), retries).exhausted is None


def test_causes_do_not_use_up_each_others_budgets() -> None:
    decision = decide_retry(failures(*[Cause.HANG] * 5, *[Cause.INFRASTRUCTURE] * 20), Retries())
    assert decision.exhausted is None
    assert decision.restarts == {Cause.HANG: 5, Cause.INFRASTRUCTURE: 20}


def test_preemption_is_never_charged() -> None:
    decision = decide_retry(failures(*[Cause.PREEMPTION] * 500), Retries(infrastructure=0, hang=0, user=0))
    assert decision.exhausted is None
    assert decision.restarts == {Cause.PREEMPTION: 500}


def test_a_lost_result_is_charged_to_infrastructure_and_named() -> None:
    done = attempt("a", "0123456789abcdef", ended=1.0)
    decision = decide_retry([done], Retries())
    assert decision.restarts == {Cause.INFRASTRUCTURE: 1}
    assert decision.message == "attempt 1 reported success, but the store has no artifact 0123456789ab"


def days_of_training(number: int, hours: float, step_of_each: int | None = 100) -> list[Attempt]:
    """Attempts of so many hours, each of which lost a node after it had made checkpoints."""
    seconds = hours * 3600.0
    return [
        failed(
            "a", D, index, running_since=(index - 1) * seconds, ended=index * seconds,
            last_step=None if step_of_each is None else index * step_of_each,
        )
        for index in range(1, number + 1)
    ]  # fmt: skip


def test_failures_after_progress_use_up_no_budget() -> None:
    """A training on 16,384 GPUs loses a node every three hours (The Llama 3 Herd of Models, table 5)."""
    assert decide_retry(days_of_training(400, hours=3), Retries()).exhausted is None


def test_running_for_long_without_a_new_checkpoint_is_no_progress() -> None:
    same_step = [replace(item, last_step=100) for item in days_of_training(22, hours=3)]
    assert decide_retry(same_step, Retries()).exhausted is Cause.INFRASTRUCTURE
    assert decide_retry(days_of_training(21, hours=3, step_of_each=None), Retries()).exhausted is Cause.INFRASTRUCTURE


def test_a_new_checkpoint_in_a_short_time_is_charged_all_the_same() -> None:
    assert decide_retry(days_of_training(21, hours=0.1), Retries()).exhausted is Cause.INFRASTRUCTURE


def test_an_error_of_the_run_itself_is_never_repaid() -> None:
    errors = [replace(item, cause=Cause.USER) for item in days_of_training(1, hours=30)]
    assert decide_retry(errors, Retries()).exhausted is Cause.USER


def test_failures_that_are_no_longer_stored_keep_what_progress_has_repaid() -> None:
    older = [Forgotten({Cause.INFRASTRUCTURE: 300}, until=0.5, last_step=9, repaid={Cause.INFRASTRUCTURE: 290})]
    decision = decide_retry(failures(*[Cause.INFRASTRUCTURE] * 10), Retries(), older)
    assert decision.exhausted is None
    assert decision.restarts == {Cause.INFRASTRUCTURE: 310}
    assert decide_retry(failures(*[Cause.INFRASTRUCTURE] * 11), Retries(), older).exhausted is Cause.INFRASTRUCTURE


def test_the_message_of_a_user_error_is_reported_unchanged() -> None:
    assert decide_retry(failures(Cause.USER), Retries()).message == "failure 1"


def test_an_exhausted_budget_is_named_with_the_field_that_sets_it() -> None:
    decision = decide_retry(failures(Cause.HANG, Cause.INFRASTRUCTURE, Cause.HANG), Retries(hang=1))
    assert decision.message == "failure 3 (failure 2 charged to hang in 7 days; `retries.hang` is 1)"


def test_a_failure_without_a_message_still_names_attempt_and_cause() -> None:
    silent = failed("a", D, 3, message="")
    assert decide_retry([silent], Retries()).message == "attempt 3 ended without a message (infrastructure)"


def test_the_backoff_doubles_up_to_five_minutes() -> None:
    assert [backoff_seconds(streak) for streak in (0, 1, 2, 3, 9, 10, 10_000)] == [0, 1, 2, 4, 256, 300, 300]


def test_the_backoff_counts_from_the_end_of_the_last_attempt() -> None:
    causes = [Cause.INFRASTRUCTURE] * 3
    assert decide_retry(failures(*causes), Retries()).not_before == 3.0 + 4.0


def test_an_attempt_that_ran_long_begins_a_new_streak() -> None:
    short = failures(*[Cause.INFRASTRUCTURE] * 3)
    long = failed("a", D, 4, running_since=10.0, ended=1000.0)
    after = failed("a", D, 5, running_since=1001.0, ended=1002.0)
    assert decide_retry([*short, long], Retries()).not_before == 1000.0 + 1.0
    assert decide_retry([*short, long, after], Retries()).not_before == 1002.0 + 2.0


def test_time_in_a_queue_is_not_time_run() -> None:
    queued = failed("a", D, 4, started=10.0, running_since=999.0, ended=1000.0)
    assert decide_retry([*failures(Cause.INFRASTRUCTURE), queued], Retries()).not_before == 1000.0 + 2.0


def test_one_preemption_is_retried_immediately_and_repeated_ones_back_off() -> None:
    once = failures(Cause.INFRASTRUCTURE, Cause.INFRASTRUCTURE, Cause.PREEMPTION)
    assert decide_retry(once, Retries()).not_before == 3.0
    assert decide_retry(failures(*[Cause.PREEMPTION] * 3), Retries()).not_before == 3.0 + 2.0


def test_only_ended_attempts_at_this_digest_count() -> None:
    attempts = [
        failed("a", D, 4, ended=9.0),
        failed("a", "other", 2, ended=9.0),
        failed("a", D, 3, ended=5.0),
        attempt("a", D, 5),
    ]
    assert [item.number for item in without_result(attempts, D)] == [3, 4]


def test_without_failures_nothing_is_exhausted_and_nothing_waits() -> None:
    decision = decide_retry([], Retries())
    assert (decision.exhausted, decision.not_before, decision.restarts) == (None, 0.0, {})


def test_attempts_that_are_no_longer_stored_still_count() -> None:
    older = [Forgotten({Cause.INFRASTRUCTURE: 18, Cause.PREEMPTION: 40}, until=0.5)]
    two = failures(Cause.INFRASTRUCTURE, Cause.INFRASTRUCTURE)
    assert decide_retry(two, Retries(), older).exhausted is None
    decision = decide_retry(failures(*[Cause.INFRASTRUCTURE] * 3), Retries(), older)
    assert decision.exhausted is Cause.INFRASTRUCTURE
    assert decision.restarts == {Cause.INFRASTRUCTURE: 21, Cause.PREEMPTION: 40}
    assert "failure 21" in decision.message


DAY = 86_400.0


def test_a_run_that_trains_two_days_between_node_losses_never_fails_of_them() -> None:
    """A node of a thousand GPUs is lost every few days (Llama 3: 419 losses in 54 days on 16,384)."""
    lost = [
        failed("a", D, number, message="node lost", running_since=0.0, ended=2 * DAY * number)
        for number in range(1, 61)
    ]
    for number in range(1, 61):
        assert decide_retry(lost[:number], Retries()).exhausted is None
        # The same if a driver stores the newest attempts only, and groups of the others.
        older = [Forgotten({Cause.INFRASTRUCTURE: 1}, item.ended or 0.0) for item in lost[: max(0, number - 8)]]
        assert decide_retry(lost[max(0, number - 8) : number], Retries(), older).exhausted is None


def test_failures_within_the_window_use_up_the_budget() -> None:
    often = [failed("a", D, number, ended=number * 6 * 3600.0) for number in range(1, 30)]
    assert decide_retry(often[:20], Retries()).exhausted is None
    decision = decide_retry(often[:21], Retries())
    assert decision.exhausted is Cause.INFRASTRUCTURE
    assert (
        decision.message
        == "failure 21 (failure 21 charged to infrastructure in 7 days; `retries.infrastructure` is 20)"
    )
    assert decide_retry(often, Retries(window_days=1)).exhausted is None


@given(
    st.lists(st.tuples(st.sampled_from(list(Cause)), st.floats(0.0, 30 * DAY), st.none() | st.just(5)), max_size=400),
    st.integers(1, 20),
)
def test_no_stage_without_new_checkpoints_is_retried_for_ever(
    history: list[tuple[Cause, float, int | None]], allowed: int
) -> None:
    """However slowly it fails; the first checkpoint is new, and then it makes none."""
    retries = Retries(infrastructure=allowed, hang=allowed, user=0)
    now, ended = 0.0, list[Attempt]()
    charged: Counter[Cause] = Counter()
    for number, (cause, seconds, step) in enumerate(history, start=1):
        now += seconds
        ended.append(failed("a", D, number, cause, ended=now, last_step=step))
        charged[cause] += cause is not Cause.PREEMPTION
        if decide_retry(ended, retries).exhausted is not None:
            break
    assert all(count <= 2 * allowed * 10 + 2 for count in charged.values())


def test_a_stage_that_has_failed_stays_failed_when_the_window_has_passed() -> None:
    spent = failures(*[Cause.HANG] * 6)
    assert decide_retry(spent, Retries()).exhausted is Cause.HANG  # as of its last failure: there is no other clock


def test_past_failures_are_not_charged_but_lengthen_the_backoff() -> None:
    """With a retry in the future, 140 attempts were made in 1.2 minutes."""
    past = [replace(item, past=True) for item in failures(*[Cause.USER] * 5)]
    decision = decide_retry(past, Retries())
    assert (decision.exhausted, decision.restarts, decision.not_before) == (None, {}, 5.0 + 16.0)
    again = decide_retry([*past, failed("a", D, 6, ended=6.0)], Retries())
    assert (again.restarts, again.not_before) == ({Cause.INFRASTRUCTURE: 1}, 6.0 + 32.0)


def test_attempts_that_are_no_longer_stored_lengthen_the_backoff_too() -> None:
    older = [Forgotten({Cause.INFRASTRUCTURE: 7}, until=0.5)]
    assert decide_retry(failures(Cause.INFRASTRUCTURE), Retries(), older).not_before == 1.0 + 128.0
