"""Errors that end a stage early. Each maps to an exit code of the contract; the launcher writes the result file.

StageError
├── UserError      the run's configuration or data is wrong
├── GateFailed     a metric missed its gate
├── Diverged       the loss is not finite
└── Interrupted    asked to stop; a checkpoint is saved
"""

from __future__ import annotations

from stagecoach_api.outcomes import ExitCode


class StageError(Exception):
    """A stage ended without a result for a known reason."""

    exit_code: ExitCode = ExitCode.USER_ERROR


class UserError(StageError):
    """The run is wrong; the message states where, what was found, what is allowed and what to do."""


class GateFailed(StageError):
    """The stage completed, but a metric missed its gate."""

    exit_code = ExitCode.GATE_FAILED


class Diverged(StageError):
    """The loss is not finite; the message names the step and the last good checkpoint."""

    exit_code = ExitCode.DIVERGED


class Interrupted(StageError):
    """The stage was asked to stop (SIGTERM, Ctrl-C); training has saved a checkpoint."""

    exit_code = ExitCode.INTERRUPTED
