"""How an attempt ends: exit codes, causes, and the result file that the launcher writes."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum

from pydantic import ConfigDict, Field

from stagecoach_api.base import Model


class ExitCode(IntEnum):
    """Exit codes of a stage's worker. Any other code, and any signal, counts as an infrastructure failure."""

    DONE = 0
    USER_ERROR = 64
    """The run itself is at fault (configuration, data): another attempt would fail in the same way."""
    GATE_FAILED = 65
    """The stage did its work, but a metric missed its gate."""
    DIVERGED = 66
    """The loss is NaN or infinite, or training violated a guard."""
    STORAGE = 74
    """The store, or an endpoint, was unreachable or denied access, after retries."""
    INTERRUPTED = 75
    """The worker was asked to stop, and saved a checkpoint."""
    HANG = 79
    """The worker made no progress for too long."""


FAULT_CHARACTERS = 256
MAX_WARNINGS = 8
WARNING_CHARACTERS = 256

WAITING_FAULT = "waiting: "
"""Begins the fault of an attempt that waited too long; the reason for which it waited follows."""
PROCESS_FAULT = "process: "
"""Begins the fault of an attempt whose process ended without a result, in a way that an environment may repeat."""
OUT_OF_MEMORY_FAULT = f"{PROCESS_FAULT}OOMKilled"
"""The fault of an attempt that needed more memory than its limit."""


class Cause(StrEnum):
    """Why an attempt ended without a result; each has a retry budget of its own."""

    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    HANG = "hang"
    PREEMPTION = "preemption"
    """It was asked to stop, by the user, the operator or the cluster; never charged to a budget."""


CAUSE_OF_EXIT: dict[int, Cause] = {
    ExitCode.USER_ERROR: Cause.USER,
    ExitCode.GATE_FAILED: Cause.USER,
    ExitCode.DIVERGED: Cause.USER,
    ExitCode.STORAGE: Cause.INFRASTRUCTURE,
    ExitCode.INTERRUPTED: Cause.PREEMPTION,
    ExitCode.HANG: Cause.HANG,
}


def cause_of_exit(code: int) -> Cause:
    """Return the cause of an exit code other than 0; a negative code is the signal that killed the worker."""
    return CAUSE_OF_EXIT.get(code, Cause.INFRASTRUCTURE)


def process_fault(code: int) -> str | None:
    """Return the fault of a process that wrote no result. `code`: its exit code, negative for a signal.

    None unless it ended on its own account, with a code that has no meaning: a missing program (127), for instance.
    """
    return f"{PROCESS_FAULT}exit code {code}" if code > 0 and code not in CAUSE_OF_EXIT else None


class AttemptResult(Model):
    """Result of an attempt, written by the launcher: at most 4,000 bytes of JSON (a pod's termination message).

    Unknown fields are ignored: a newer trainer's result must not read as that of a killed process.
    """

    model_config = ConfigDict(extra="ignore")

    exit_code: int
    """Exit code of the worker that ended first; negative for a signal."""

    cause: Cause | None = None
    """Why it ended without an artifact. None if it succeeded."""

    content_digest: str | None = Field(default=None, max_length=64)
    """Content digest of the published artifact. None if it published none."""

    artifact_uri: str | None = Field(default=None, max_length=1024)
    """URI of that artifact's folder. None if it published none, or from a trainer of an earlier version."""

    artifact_endpoint: str | None = Field(default=None, max_length=512)
    """S3 endpoint of the storage of that artifact; empty for AWS. None as `artifact_uri`."""

    message: str = Field(default="", max_length=2500)
    """What happened, in a few sentences; for an error: where, what was got, what is allowed, what to do."""

    last_step: int | None = None
    """Last optimiser step with a complete checkpoint. None if there is no checkpoint or the stage does not train."""

    fault: str | None = Field(default=None, max_length=FAULT_CHARACTERS)
    """Type and place of the error, if it is one that is expected to recur at the same place unless the user changes
    something (`stagecoach_api.faults`). None for all others, such as a lost connection or the end of another rank."""

    warnings: tuple[str, ...] = ()
    """The stage's warnings, as many and as much of each as there is room for: at most MAX_WARNINGS of
    WARNING_CHARACTERS. If some are left out, the last entry is their count."""


def bounded_warnings(warnings: Sequence[str], number: int = MAX_WARNINGS) -> tuple[str, ...]:
    """Return at most `number` warnings, each shortened to WARNING_CHARACTERS.

    If some are left out, the last entry is their count.
    """
    shown = warnings if len(warnings) <= number else warnings[: max(0, number - 1)]
    more = len(warnings) - len(shown)
    others = f"and {more} more warning{'s' * (more > 1)}; the stage's log and report.json list all"
    texts = [text if len(text) <= WARNING_CHARACTERS else f"{text[: WARNING_CHARACTERS - 1]}…" for text in shown]
    return (*texts, *([others] if more else []))
