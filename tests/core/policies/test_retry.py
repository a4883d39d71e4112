"""Retry budgets and back-off."""

from __future__ import annotations

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Retries
from stagecoach_core.policies.retry import backoff_seconds, decide_retry, without_result
from stagecoach_core.values import Attempt
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


def test_the_message_of_a_user_error_is_reported_unchanged() -> None:
    assert decide_retry(failures(Cause.USER), Retries()).message == "failure 1"


def test_an_exhausted_budget_is_named_with_the_field_that_sets_it() -> None:
    decision = decide_retry(failures(Cause.HANG, Cause.INFRASTRUCTURE, Cause.HANG), Retries(hang=1))
    assert decision.message == "failure 3 (failure 2 charged to hang; `retries.hang` is 1)"


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
    long = failed("a", D, 4, started=10.0, ended=1000.0)
    after = failed("a", D, 5, started=1001.0, ended=1002.0)
    assert decide_retry([*short, long], Retries()).not_before == 1000.0 + 1.0
    assert decide_retry([*short, long, after], Retries()).not_before == 1002.0 + 2.0


def test_time_in_a_queue_is_not_time_run() -> None:
    queued = failed("a", D, 4, started=10.0, running_since=999.0, ended=1000.0)
    assert decide_retry([*failures(Cause.INFRASTRUCTURE), queued], Retries()).not_before == 1000.0 + 2.0


def test_one_preemption_is_retried_immediately_and_repeated_ones_back_off() -> None:
    once = failures(Cause.INFRASTRUCTURE, Cause.INFRASTRUCTURE, Cause.PREEMPTION)
    assert decide_retry(once, Retries()).not_before == 3.0
    assert decide_retry(failures(*[Cause.PREEMPTION] * 3), Retries()).not_before == 3.0 + 2.0


def test_only_ended_attempts_at_this_digest_since_the_user_asked_count() -> None:
    attempts = [
        failed("a", D, 4, ended=9.0),
        failed("a", D, 1, ended=4.9),
        failed("a", "other", 2, ended=9.0),
        failed("a", D, 3, ended=5.0),
        attempt("a", D, 5),
    ]
    assert [item.number for item in without_result(attempts, D, since=5.0)] == [3, 4]


def test_without_failures_nothing_is_exhausted_and_nothing_waits() -> None:
    decision = decide_retry([], Retries())
    assert (decision.exhausted, decision.not_before, decision.restarts) == (None, 0.0, {})


def test_attempts_that_are_no_longer_stored_still_count() -> None:
    older = {Cause.INFRASTRUCTURE: 18, Cause.PREEMPTION: 40}
    two = failures(Cause.INFRASTRUCTURE, Cause.INFRASTRUCTURE)
    assert decide_retry(two, Retries(), older).exhausted is None
    decision = decide_retry(failures(*[Cause.INFRASTRUCTURE] * 3), Retries(), older)
    assert decision.exhausted is Cause.INFRASTRUCTURE
    assert decision.restarts == {Cause.INFRASTRUCTURE: 21, Cause.PREEMPTION: 40}
    assert "failure 21" in decision.message
