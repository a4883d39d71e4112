"""`stagecoach suspend`: stop a run at its next checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import WHICH_WORLD, cluster_options, explained, say, wait_option

if TYPE_CHECKING:
    from stagecoach_cli.cluster.api import ClusterChoice
    from stagecoach_local.workspace import RunFolder


@click.command(
    "suspend",
    help=f"""Stop a run at its next checkpoint; it gives up all it holds. `stagecoach resume` goes on from there.

    On a cluster this sets `spec.suspend`. Here it asks the process that works on the run, as Ctrl-C does.

    {WHICH_WORLD}""",
)
@click.argument("run")
@cluster_options
@wait_option("nothing of it runs any more")
def command(run: str, context: str | None, namespace: str | None, wait: bool) -> None:
    with explained():
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.target import local_run

        choice = ClusterChoice(context, namespace)
        folder = local_run(run, choice)
        if folder is None:
            suspend_on_cluster(run, choice, wait)
        else:
            suspend_here(folder, wait)


def suspend_on_cluster(name: str, choice: ClusterChoice, wait: bool) -> None:
    from stagecoach_api.status import ConditionType
    from stagecoach_cli.cluster.watch import watch_quietly
    from stagecoach_cli.target import ask_cluster

    api, run = ask_cluster(name, choice, "suspend")
    click.echo(f"{run.title}: asked to stop at a checkpoint; `stagecoach resume {run.title}` goes on")
    if wait:
        run = watch_quietly(api, run.name, lambda item: item.holds(ConditionType.SUSPENDED) or item.is_over, say)
        condition = run.condition(ConditionType.SUSPENDED)
        steps = "" if condition is None or not condition.message else f"; {condition.message}"
        click.echo(f"{run.title}: {run.state.value.lower()}{steps}")


def suspend_here(folder: RunFolder, wait: bool) -> None:
    from stagecoach_local.control import ask_driver, wait_for_driver
    from stagecoach_local.interrupts import SUSPEND

    driver = ask_driver(folder, SUSPEND)
    if driver is None:
        click.echo(f"{folder.name}: nothing works on it; `stagecoach resume {folder.name}` goes on")
        return
    click.echo(f"{folder.name}: process {driver} asked to stop at a checkpoint")
    if wait:
        wait_for_driver(folder)
        click.echo(f"{folder.name}: stopped; `stagecoach resume {folder.name}` goes on")
