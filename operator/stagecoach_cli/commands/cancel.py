"""`stagecoach cancel`: end a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import WHICH_WORLD, cluster_options, explained, say, wait_option

if TYPE_CHECKING:
    from stagecoach_cli.cluster.api import ClusterChoice
    from stagecoach_local.workspace import RunFolder


@click.command(
    "cancel",
    help=f"""End a run: what runs stops, nothing more starts. Finished stages and saved checkpoints stay.

    On a cluster this sets `spec.cancel`; here it asks the process that works on the run. `stagecoach resume` takes it
    back: the run goes on from its checkpoints.

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
            cancel_on_cluster(run, choice, wait)
        else:
            cancel_here(folder, wait)


def cancel_on_cluster(name: str, choice: ClusterChoice, wait: bool) -> None:
    from stagecoach_cli.cluster.watch import watch_quietly
    from stagecoach_cli.target import ask_cluster

    api, run = ask_cluster(name, choice, "cancel")
    click.echo(f"{run.title}: asked to end; saved checkpoints stay")
    if wait:
        run = watch_quietly(api, run.name, lambda item: item.is_over, say)
        click.echo(f"{run.title}: {run.state.value.lower()}")


def cancel_here(folder: RunFolder, wait: bool) -> None:
    from stagecoach_local.control import ask_driver, mark_cancelled, wait_for_driver
    from stagecoach_local.interrupts import CANCEL

    driver = ask_driver(folder, CANCEL)
    if driver is None:
        mark_cancelled(folder)
    else:
        click.echo(f"{folder.name}: process {driver} asked to end the run; saved checkpoints stay")
        if not wait:
            return
        wait_for_driver(folder)
    record = folder.load()
    click.echo(f"{folder.name}: {record.state.value.lower() if record is not None else 'cancelled'}")
