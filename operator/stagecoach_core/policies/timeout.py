"""Time-outs and hangs: the reasons to stop an attempt that depend on time.

`timeoutSeconds` limits the time that one attempt runs, without the time in which a queue held it; exceeding it is
charged to the user, who set the limit. A hang is the absence of heartbeats for longer than a limit that adapts to the
longest silence seen so far.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Deadlines
from stagecoach_core.values import Attempt, AttemptState, Stop


@dataclass(frozen=True)
class HangLimits:
    """How long an attempt may be without a heartbeat."""

    shortest_seconds: float = 600.0
    """Shorter silence is never a hang."""
    factor: float = 3.0
    """Silence up to this many times the longest one so far is not a hang either."""
    start_seconds: float = 1800.0
    """Silence before the first heartbeat, while images, libraries and inputs are loaded."""


DEFAULT_LIMITS = HangLimits()


def limits_of(deadlines: Deadlines) -> HangLimits:
    """Return the limits of a stage."""
    start = deadlines.start_seconds
    return DEFAULT_LIMITS if start is None else HangLimits(start_seconds=float(start))


def stop_overdue(
    attempt: Attempt, timeout_seconds: int | None, now: float, limits: HangLimits = DEFAULT_LIMITS
) -> Stop | None:
    """Return the order to stop an attempt that hangs or has exceeded its time limit. None if it may continue."""
    if attempt.state is not AttemptState.RUNNING:
        return None
    # The time-out first: an attempt that hangs beyond it is the user's, and is not retried as a hang.
    if timeout_seconds is not None and now >= _time_is_up(attempt, timeout_seconds):
        reason = f"it ran longer than `timeoutSeconds` ({timeout_seconds}) allows"
        return Stop(attempt.stage, attempt.number, reason, Cause.USER)
    if now >= silence_ends(attempt, limits):
        silent = now - _last_heartbeat(attempt)
        reason = f"no heartbeat for {silent:.0f} s; the limit is {silence_limit(attempt, limits):.0f} s"
        reason += "" if attempt.heartbeat is not None else " before the first one"
        return Stop(attempt.stage, attempt.number, reason, Cause.HANG)
    return None


def deadline(attempt: Attempt, timeout_seconds: int | None, limits: HangLimits = DEFAULT_LIMITS) -> float | None:
    """Return when a running attempt will be stopped if no heartbeat arrives until then. None if it is not running."""
    if attempt.state is not AttemptState.RUNNING:
        return None
    ends = silence_ends(attempt, limits)
    return ends if timeout_seconds is None else min(ends, _time_is_up(attempt, timeout_seconds))


def silence_limit(attempt: Attempt, limits: HangLimits = DEFAULT_LIMITS) -> float:
    """Return the number of seconds of silence that are allowed now."""
    # Adapts to stages that are silent for long by nature, such as one that writes a large checkpoint.
    if attempt.heartbeat is None:
        return limits.start_seconds
    return max(limits.shortest_seconds, limits.factor * attempt.longest_silence)


def silence_ends(attempt: Attempt, limits: HangLimits = DEFAULT_LIMITS) -> float:
    """Return when the present silence becomes a hang, in seconds since the epoch."""
    return _last_heartbeat(attempt) + silence_limit(attempt, limits)


def _time_is_up(attempt: Attempt, timeout_seconds: int) -> float:
    return _running_since(attempt) + timeout_seconds - attempt.ran_before


def _running_since(attempt: Attempt) -> float:
    return attempt.started if attempt.running_since is None else attempt.running_since


def _last_heartbeat(attempt: Attempt) -> float:
    known = _running_since(attempt) if attempt.heartbeat is None else attempt.heartbeat
    return max(known, attempt.listening_since)
