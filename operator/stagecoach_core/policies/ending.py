"""The cause that the end of an attempt is charged to."""

from __future__ import annotations

from stagecoach_api.outcomes import AttemptResult, Cause


def cause_of_end(stop_cause: Cause | None, result: AttemptResult | None) -> Cause | None:
    """Return `Attempt.cause` of an attempt that has ended. None if it succeeded.

    `stop_cause`: cause of the `Stop` that the driver carried out on it, None if there was none. `result`: the result
    that the launcher wrote, None if it wrote none, which means that it was killed.

    Success counts even if the attempt was asked to stop just before. An attempt that was stopped because it hung or ran
    too long is charged for that, even if it then exited cleanly. A user error is always charged as such.
    """
    if result is not None and result.cause is None:
        return None
    own = Cause.INFRASTRUCTURE if result is None else result.cause
    if stop_cause is None:
        return own
    return Cause.USER if own is Cause.USER else stop_cause
