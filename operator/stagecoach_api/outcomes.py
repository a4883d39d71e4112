"""How an attempt ends: exit codes, causes, and the result file the launcher leaves behind."""

from __future__ import annotations

from enum import IntEnum, StrEnum

from pydantic import Field

from stagecoach_api.base import Model


class ExitCode(IntEnum):
    """Exit codes of a stage's worker. Everything else, and every signal, counts as infrastructure."""

    DONE = 0
    USER_ERROR = 64
    """The run is wrong (configuration, data): the same attempt would fail again."""
    GATE_FAILED = 65
    """The stage did its work, and a metric missed its gate."""
    DIVERGED = 66
    """The loss is no number, or training broke a guard."""
    STORAGE = 74
    """Storage, or an endpoint, did not answer or refused, after retries."""
    INTERRUPTED = 75
    """Asked to stop; a checkpoint is saved."""
    HANG = 79
    """No progress for too long."""


class Cause(StrEnum):
    """Why an attempt ended without a result; each has a retry budget of its own."""

    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    HANG = "hang"
    PREEMPTION = "preemption"
    """Asked to stop by somebody; never charged."""


CAUSE_OF_EXIT: dict[int, Cause] = {
    ExitCode.USER_ERROR: Cause.USER,
    ExitCode.GATE_FAILED: Cause.USER,
    ExitCode.DIVERGED: Cause.USER,
    ExitCode.STORAGE: Cause.INFRASTRUCTURE,
    ExitCode.INTERRUPTED: Cause.PREEMPTION,
    ExitCode.HANG: Cause.HANG,
}


def cause_of_exit(code: int) -> Cause:
    """Return the cause an exit code other than 0 stands for; a negative code is the signal that killed the worker."""
    return CAUSE_OF_EXIT.get(code, Cause.INFRASTRUCTURE)


class AttemptResult(Model):
    """What the launcher writes when an attempt ends: at most 4,000 bytes of JSON (a Pod's termination message)."""

    exit_code: int
    """Exit code of the worker that ended first; negative for a signal."""

    cause: Cause | None = None
    """Why it ended without a result. None: it is done."""

    content_digest: str | None = Field(default=None, max_length=64)
    """Content digest of the published artifact. None: there is none."""

    message: str = Field(default="", max_length=2500)
    """What happened, in a sentence or a few; for an error: where, what was got, what is allowed, what to do."""

    last_step: int | None = None
    """Last optimiser step whose checkpoint is complete. None: no checkpoint, or not a training stage."""
