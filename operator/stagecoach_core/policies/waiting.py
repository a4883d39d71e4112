"""Deadlines of an attempt that does not run yet: how long it may wait for quota, nodes, its image, its containers.

Waiting for quota or nodes is charged to the user at once: another attempt would wait as long again. An image or a
Secret may be missing for a moment only, such as while a registry is down, so that end is charged to the infrastructure
until it recurs (`policies.ending`).
"""

from __future__ import annotations

from stagecoach_api.outcomes import WAITING_FAULT, Cause
from stagecoach_api.spec import Deadlines
from stagecoach_core.values import Attempt, AttemptState, Stop, Wait, WaitKind

DEFAULT_DEADLINES = Deadlines(quota_seconds=604_800, scheduling_seconds=86_400, image_seconds=300, start_seconds=1800)
"""The deadlines of a stage that sets none."""

_FIELDS = {
    WaitKind.QUOTA: "quota_seconds",
    WaitKind.SCHEDULING: "scheduling_seconds",
    WaitKind.IMAGE: "image_seconds",
    WaitKind.PODS: "start_seconds",
}
_CAUSES = {
    WaitKind.QUOTA: Cause.USER,
    WaitKind.SCHEDULING: Cause.USER,
    WaitKind.IMAGE: Cause.INFRASTRUCTURE,
    WaitKind.PODS: Cause.INFRASTRUCTURE,
}


def seconds_allowed(kind: WaitKind, deadlines: Deadlines) -> int:
    """Return how many seconds an attempt may wait for this."""
    given: int | None = getattr(deadlines, _FIELDS[kind])
    default: int = getattr(DEFAULT_DEADLINES, _FIELDS[kind])
    return default if given is None else given


def wait_ends(attempt: Attempt, deadlines: Deadlines) -> float | None:
    """Return when an attempt will have waited too long, in seconds since the epoch. None if it is not waiting."""
    if attempt.wait is None or attempt.state is not AttemptState.STARTING:
        return None
    return attempt.wait.since + seconds_allowed(attempt.wait.kind, deadlines)


def stop_waiting(attempt: Attempt, deadlines: Deadlines, now: float) -> Stop | None:
    """Return the order to stop an attempt that has waited too long for one thing. None if it may wait on."""
    ends = wait_ends(attempt, deadlines)
    if attempt.wait is None or ends is None or now < ends:
        return None
    return Stop(
        attempt.stage,
        attempt.number,
        _reason(attempt.wait, deadlines),
        _CAUSES[attempt.wait.kind],
        f"{WAITING_FAULT}{attempt.wait.reason or attempt.wait.kind}",
    )


def _reason(wait: Wait, deadlines: Deadlines) -> str:
    first, *rest = _FIELDS[wait.kind].split("_")
    field = first + "".join(part.title() for part in rest)
    limit = f"it did not start within `deadlines.{field}` ({seconds_allowed(wait.kind, deadlines)})"
    return f"{limit}: {wait.message or wait.reason or wait.kind}"
