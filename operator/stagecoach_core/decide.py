"""The state machine: from a plan and what is observed to what is to be done. Pure; the clock is an argument."""

from __future__ import annotations

from stagecoach_core.values import Decision, Observed, Plan


def decide(plan: Plan, observed: Observed, now: float) -> Decision:
    """Say what to do now. The same plan, observation and time give the same decision; carrying it out twice is harmless
    as long as the driver knows an attempt by its number.

    `now`: seconds since the epoch, by the clock that the times in `observed` come from.
    """
    raise NotImplementedError
