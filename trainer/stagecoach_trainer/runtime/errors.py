"""How a stage ends early. Each error is one exit code of the contract; the launcher makes the result file of it.

StageError
├── UserError      the run is wrong: configuration or data
├── GateFailed     a metric missed its gate
├── Diverged       the loss is no number
└── Interrupted    asked to stop; a checkpoint is saved
"""

from __future__ import annotations

from stagecoach_api.outcomes import ExitCode


class StageError(Exception):
    """A stage ended without a result, for a reason it can name."""

    exit_code: ExitCode = ExitCode.USER_ERROR


class UserError(StageError):
    """The run is wrong; the message says where, what was got, what is allowed and what to do."""


class GateFailed(StageError):
    """The stage did its work, and a metric missed its gate."""

    exit_code = ExitCode.GATE_FAILED


class Diverged(StageError):
    """The loss is no number; the message names the step and the last good checkpoint."""

    exit_code = ExitCode.DIVERGED


class Interrupted(StageError):
    """Asked to stop (SIGTERM, Ctrl-C); what was done so far is saved."""

    exit_code = ExitCode.INTERRUPTED
