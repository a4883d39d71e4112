"""What several subcommands share: options, consoles, and how errors are told."""

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
"""Columns where nobody's terminal sets them: a log or a pipe."""

file_argument = click.argument("file", type=click.Path(path_type=Path))

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a field, such as stages.sft.optimizer.learningRate=1e-4. May be given several times.",
)

storage_option = click.option(
    "--storage",
    metavar="URI",
    help="Where artifacts lie: s3://… or a folder. Default: the run's own, else .stagecoach/store.",
)

endpoint_option = click.option("--endpoint", metavar="URL", help="S3 endpoint. Default: the run's, else the AWS SDK's.")

WHICH_WORLD = """A run of this folder (.stagecoach) is meant where there is one by that name and neither --namespace nor
    --context is given; else the cluster's: that of KUBECONFIG, ~/.kube/config, or the pod this runs in."""
"""The one rule, in every command's help; `worlds.py` follows it."""


def cluster_options(command: Command) -> Command:
    """Give a command the options that choose a cluster: `context` and `namespace`."""
    command = click.option("--context", metavar="NAME", help="Context of the kubeconfig. Default: its current one.")(
        command
    )
    return click.option(
        "--namespace", "-n", metavar="NAME", help="Namespace on the cluster. Default: the context's, else default."
    )(command)


def wait_option(until: str) -> Callable[[Command], Command]:
    """Return the option `--wait`, which waits until what the words say."""
    return click.option("--wait", is_flag=True, help=f"Wait until {until}.")


class Failure(click.ClickException):
    """Ends a command with a message: something did not work."""

    exit_code = EXIT_FAILED

    def show(self, file: Any = None) -> None:
        click.echo(f"stagecoach: {self.message}", err=True, file=file)


class InvalidInput(Failure):
    """Ends a command with a message: what was asked for makes no sense."""

    exit_code = EXIT_INVALID


@contextmanager
def explained() -> Iterator[None]:
    """Turn the errors that users can do something about into a message and an exit code; others pass."""
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
    said = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{said}; free some space, or work in another folder: what is finished stays"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{said}; run stagecoach in a folder you may write to"
    return said


def say(text: str) -> None:
    """Tell something that is not the command's output."""
    click.echo(text, err=True)


def console(plain_width: int = PLAIN_WIDTH) -> Console:
    """Return a console: as wide as the terminal, or `plain_width` columns where there is none."""
    from rich.console import Console

    made = Console()
    return made if made.is_terminal else Console(width=plain_width)
