"""The cause that the end of an attempt is charged to."""

from __future__ import annotations

import pytest

from stagecoach_api.outcomes import AttemptResult, Cause
from stagecoach_core.policies.ending import cause_of_end

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
