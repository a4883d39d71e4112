"""The command line that `suspend` and `cancel` share: its options, and the choice between a local run and a cluster."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import TARGET_RULE, cluster_options, report_errors, wait_option

if TYPE_CHECKING:
    from stagecoach_cli.cluster.api import ClusterChoice
    from stagecoach_local.workspace import RunFolder


def stop_command(
    name: str,
    description: str,
    on_cluster: Callable[[str, ClusterChoice, bool], None],
    on_folder: Callable[[RunFolder, bool], None],
) -> click.Command:
    """Return a command that stops the target run.

    `on_cluster` gets the run's name, the cluster and `--wait`; `on_folder` gets the local run's folder and `--wait`.
    """

    @click.command(name, help=f"{cleandoc(description)}\n\n{cleandoc(TARGET_RULE)}")
    @click.argument("run")
    @cluster_options
    @wait_option("nothing of the run is running")
    def command(run: str, context: str | None, namespace: str | None, wait: bool) -> None:
        with report_errors():
            from stagecoach_cli.cluster.api import ClusterChoice
            from stagecoach_cli.target import local_run

            choice = ClusterChoice(context, namespace)
            folder = local_run(run, choice)
            if folder is None:
                on_cluster(run, choice, wait)
            else:
                on_folder(folder, wait)

    return command
