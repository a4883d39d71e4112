"""The `stagecoach` command. A subcommand and its dependencies are imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from stagecoach_api.version import __version__
from stagecoach_cli.exit_codes import EXIT_INTERRUPTED

COMMANDS = {
    "run": "stagecoach_cli.commands.run",
    "plan": "stagecoach_cli.commands.plan",
    "validate": "stagecoach_cli.commands.validate",
    "submit": "stagecoach_cli.commands.submit",
    "status": "stagecoach_cli.commands.status",
    "logs": "stagecoach_cli.commands.logs",
    "suspend": "stagecoach_cli.commands.suspend",
    "resume": "stagecoach_cli.commands.resume",
    "cancel": "stagecoach_cli.commands.cancel",
    "render": "stagecoach_cli.commands.render",
    "artifacts": "stagecoach_cli.commands.artifacts",
    "version": "stagecoach_cli.commands.version",
}
"""Modules by command name; each has a click command called `command`."""


class LazyGroup(click.Group):
    """A group that imports only the command that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name]).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name]}.command is not a click command")
        return command


@click.version_option(__version__, "--version", "-V", message="stagecoach %(version)s")
@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Train language models stage by stage from one file, on this machine (`run`) or on a cluster (`submit`).

    Commands that take a RUN work on both: on the run of that name in this folder's workspace (.stagecoach) if there is
    one and neither --namespace nor --context is given, otherwise on the cluster's.

    Exit codes: 0 success, 1 the run or an operation failed, 2 invalid input, 130 interrupted, suspended or cancelled.
    """


def call(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        result: Any = cli.main(args=arguments, prog_name="stagecoach", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `stagecoach` script."""
    sys.exit(call())
