"""Options, consoles and error reporting that several subcommands share."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stagecoach_cli.exit_codes import EXIT_FAILED, EXIT_INVALID

if TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])

PLAIN_WIDTH = 160
"""Columns if the output is not a terminal but a file or a pipe."""

file_argument = click.argument("file", type=click.Path(path_type=Path))

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a field of the run, such as stages.sft.optimizer.learningRate=1e-4. Can be given several times.",
)

storage_option = click.option(
    "--storage",
    metavar="URI",
    help="Artifact storage: s3://… or a folder. Default: the run's spec.storage, else .stagecoach/store.",
)

output_option = click.option(
    "--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Format."
)

endpoint_option = click.option(
    "--endpoint", metavar="URL", help="S3 endpoint. Default: the run's, else that of the AWS SDK."
)

TARGET_RULE = """Without --namespace and --context, a run of that name in this folder (.stagecoach) takes precedence;
    otherwise the run is looked up on the cluster of KUBECONFIG, ~/.kube/config, or the pod this runs in."""
"""Part of the help of every command on a run; `stagecoach_cli.target` implements it."""


def cluster_options(command: Command) -> Command:
    """Add the options that select a cluster: `context` and `namespace`."""
    command = click.option(
        "--context", metavar="NAME", help="Context of the kubeconfig. Default: the current context."
    )(command)
    return click.option(
        "--namespace", "-n", metavar="NAME", help="Namespace on the cluster. Default: the context's, else `default`."
    )(command)


def wait_option(until: str) -> Callable[[Command], Command]:
    """Return the option `--wait`; `until` completes its help text."""
    return click.option("--wait", is_flag=True, help=f"Wait until {until}.")


class Failure(click.ClickException):
    """Ends a command with a message, because an operation failed."""

    exit_code = EXIT_FAILED

    def show(self, file: Any = None) -> None:
        click.echo(f"stagecoach: {self.message}", err=True, file=file)


class InvalidInput(Failure):
    """Ends a command with a message, because its input is invalid."""

    exit_code = EXIT_INVALID


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn errors that a user can act on into a message and an exit code; let others pass with their traceback."""
    from stagecoach_api.code import UnparsableCode
    from stagecoach_api.problems import InvalidRun
    from stagecoach_api.store import StoreError
    from stagecoach_cli.artifacts.store import UnknownArtifact
    from stagecoach_cli.cluster.api import ClusterError, Unusable
    from stagecoach_core.plan import PlanError
    from stagecoach_core.policies.selection import UnknownStage
    from stagecoach_local.workspace import RunLocked, WorkspaceError

    try:
        yield
    except RunLocked as error:
        raise Failure(str(error)) from error
    except (InvalidRun, PlanError, UnknownStage, UnknownArtifact, Unusable, WorkspaceError) as error:
        raise InvalidInput(str(error)) from error
    except (ClusterError, StoreError, ModuleNotFoundError, UnparsableCode) as error:
        raise Failure(str(error)) from error
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise Failure(_os_error(error)) from error


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    message = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{message}; free some space, or work in another folder: finished stages are kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{message}; run stagecoach in a folder that you can write to"
    return message


def notify(text: str) -> None:
    """Print a message to stderr, for what is not the command's output."""
    click.echo(text, err=True)


def console(plain_width: int = PLAIN_WIDTH) -> Console:
    """Return a console as wide as the terminal, or `plain_width` columns wide if the output is not a terminal."""
    from rich.console import Console

    made = Console()
    return made if made.is_terminal else Console(width=plain_width)
