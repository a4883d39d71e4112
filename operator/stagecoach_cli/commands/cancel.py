"""`stagecoach cancel`: end a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import notify
from stagecoach_cli.commands.stop_command import stop_command

if TYPE_CHECKING:
    from stagecoach_cli.cluster.api import ClusterChoice
    from stagecoach_local.workspace import RunFolder


def cancel_on_cluster(name: str, choice: ClusterChoice, wait: bool) -> None:
    from stagecoach_cli.cluster.watch import wait_quietly
    from stagecoach_cli.target import set_on_cluster

    api, run = set_on_cluster(name, choice, "cancel")
    click.echo(f"{run.title}: cancelling; saved checkpoints are kept")
    if wait:
        run = wait_quietly(api, run.name, lambda item: item.is_over, notify)
        click.echo(f"{run.title}: {run.state.value.lower()}")


def cancel_local(folder: RunFolder, wait: bool) -> None:
    from stagecoach_local.control import mark_cancelled, signal_driver, wait_for_driver
    from stagecoach_local.interrupts import CANCEL

    driver = signal_driver(folder, CANCEL)
    if driver is None:
        mark_cancelled(folder)
    else:
        click.echo(f"{folder.name}: cancelling (process {driver}); saved checkpoints are kept")
        if not wait:
            return
        wait_for_driver(folder)
    record = folder.load()
    click.echo(f"{folder.name}: {record.state.value.lower() if record is not None else 'cancelled'}")


command = stop_command(
    "cancel",
    """Cancel a run: stop its stages and start no others. Finished stages and saved checkpoints are kept.

    On a cluster this sets `spec.cancel`; for a local run it signals the `stagecoach run` process. `stagecoach resume`
    reverts it and resumes the run from its checkpoints.""",
    cancel_on_cluster,
    cancel_local,
)
