"""What the end of an attempt is charged to."""

from __future__ import annotations

from stagecoach_api.outcomes import AttemptResult, Cause


def cause_of_end(stop_cause: Cause | None, result: AttemptResult | None) -> Cause | None:
    """Return the cause for `Attempt.cause` once an attempt has ended. None: it is done.

    `stop_cause`: the cause of the `Stop` the driver carried out on it; None: it was not stopped by us.
    `result`: what the launcher left behind; None: nothing, so it was killed.

    A result counts even when we asked it to stop just before. Who was stopped for hanging or for running too long is
    charged for that, however politely it then ended; but an error of its own counts as such.
    """
    if result is not None and result.cause is None:
        return None
    own = Cause.INFRASTRUCTURE if result is None else result.cause
    if stop_cause is None:
        return own
    return Cause.USER if own is Cause.USER else stop_cause
