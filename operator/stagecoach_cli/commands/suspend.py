"""`stagecoach suspend`: stop a run at its next checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import notify
from stagecoach_cli.commands.stop_command import stop_command

if TYPE_CHECKING:
    from stagecoach_cli.cluster.api import ClusterChoice
    from stagecoach_local.workspace import RunFolder


def suspend_on_cluster(name: str, choice: ClusterChoice, wait: bool) -> None:
    from stagecoach_api.status import ConditionType
    from stagecoach_cli.cluster.watch import wait_quietly
    from stagecoach_cli.target import set_on_cluster

    api, run = set_on_cluster(name, choice, "suspend")
    click.echo(f"{run.title}: stopping at a checkpoint; resume with `stagecoach resume {run.title}`")
    if wait:
        run = wait_quietly(api, run.name, lambda item: item.is_true(ConditionType.SUSPENDED) or item.is_over, notify)
        condition = run.condition(ConditionType.SUSPENDED)
        steps = "" if condition is None or not condition.message else f"; {condition.message}"
        click.echo(f"{run.title}: {run.state.value.lower()}{steps}")


def suspend_local(folder: RunFolder, wait: bool) -> None:
    from stagecoach_local.control import signal_driver, wait_for_driver
    from stagecoach_local.interrupts import SUSPEND

    driver = signal_driver(folder, SUSPEND)
    if driver is None:
        click.echo(f"{folder.name}: not running; resume with `stagecoach resume {folder.name}`")
        return
    click.echo(f"{folder.name}: stopping at a checkpoint (process {driver})")
    if wait:
        wait_for_driver(folder)
        click.echo(f"{folder.name}: stopped; resume with `stagecoach resume {folder.name}`")


command = stop_command(
    "suspend",
    """Stop a run at its next checkpoint and release its resources. `stagecoach resume` continues from the checkpoint.

    On a cluster this sets `spec.suspend`; for a local run it signals the `stagecoach run` process, with the same effect
    as Ctrl-C there.""",
    suspend_on_cluster,
    suspend_local,
)
