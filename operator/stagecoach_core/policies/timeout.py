"""Attempts that take too long, and attempts that hang.

`timeoutSeconds` bounds one attempt from its first process on; running into it is charged to the user, whose limit it
is. A hang is silence: no heartbeat for longer than a limit that adapts to the longest silence seen so far.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach_api.outcomes import Cause
from stagecoach_core.values import Attempt, AttemptState, Stop


@dataclass(frozen=True)
class HangLimits:
    """How long silence may last."""

    shortest_seconds: float = 600.0
    """Silence up to this is never a hang."""
    factor: float = 3.0
    """Silence up to this many times the longest one so far is no hang either."""
    start_seconds: float = 1800.0
    """Silence before the first heartbeat: images, libraries and inputs are loaded."""


DEFAULT_LIMITS = HangLimits()


def overdue(
    attempt: Attempt, timeout_seconds: int | None, now: float, limits: HangLimits = DEFAULT_LIMITS
) -> Stop | None:
    """Return the order to stop an attempt that hangs or has run out of time. None: it may go on."""
    if attempt.state is not AttemptState.RUNNING:
        return None
    if timeout_seconds is not None and now >= _begun(attempt) + timeout_seconds:
        reason = f"it ran longer than `timeoutSeconds` ({timeout_seconds}) allows"
        return Stop(attempt.stage, attempt.number, reason, Cause.USER)
    if now >= silence_ends(attempt, limits):
        silent = now - _last_sign(attempt)
        reason = f"no sign of life for {silent:.0f} s, the limit is {silence_limit(attempt, limits):.0f} s"
        return Stop(attempt.stage, attempt.number, reason, Cause.HANG)
    return None


def deadline(attempt: Attempt, timeout_seconds: int | None, limits: HangLimits = DEFAULT_LIMITS) -> float | None:
    """Return when a running attempt is overdue if nothing more is heard of it. None: it does not run."""
    if attempt.state is not AttemptState.RUNNING:
        return None
    ends = silence_ends(attempt, limits)
    return ends if timeout_seconds is None else min(ends, _begun(attempt) + timeout_seconds)


def silence_limit(attempt: Attempt, limits: HangLimits = DEFAULT_LIMITS) -> float:
    """Return how many seconds of silence are allowed now."""
    if attempt.heartbeat is None:
        return max(limits.start_seconds, limits.shortest_seconds)
    return max(limits.shortest_seconds, limits.factor * attempt.longest_silence)


def silence_ends(attempt: Attempt, limits: HangLimits = DEFAULT_LIMITS) -> float:
    return _last_sign(attempt) + silence_limit(attempt, limits)


def _begun(attempt: Attempt) -> float:
    return attempt.started if attempt.running_since is None else attempt.running_since


def _last_sign(attempt: Attempt) -> float:
    return _begun(attempt) if attempt.heartbeat is None else attempt.heartbeat
