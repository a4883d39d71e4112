"""`stagecoach artifacts gc`: delete what nothing needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import (
    Failure,
    cluster_options,
    console,
    endpoint_option,
    explained,
    say,
    storage_option,
)

if TYPE_CHECKING:
    from rich.table import Table

    from stagecoach_cli.artifacts.collect import StoredArtifact
    from stagecoach_cli.cluster.api import ClusterChoice


@click.command("gc")
@storage_option
@endpoint_option
@click.option(
    "--older-than",
    type=click.FloatRange(min=0.0),
    default=1.0,
    show_default=True,
    metavar="DAYS",
    help="What has an object that is younger stays: somebody may be at work on it.",
)
@click.option("--delete", is_flag=True, help="Delete them. Without it they are only listed.")
@cluster_options
@click.option("--no-cluster", is_flag=True, help="Ask no cluster which artifacts its runs have in use.")
def collect_garbage(
    storage: str | None,
    endpoint: str | None,
    older_than: float,
    delete: bool,
    context: str | None,
    namespace: str | None,
    no_cluster: bool,
) -> None:
    """List the artifacts that nothing needs, and with --delete delete them.

    Needed is what a pointer names (runs/ in the storage), what a run of this folder or of the cluster has in use,
    what is young, and everything these were made from. The cluster is asked where the storage is S3: all its
    namespaces, or the one given. Delete nothing while another run is being submitted that might take it from the cache.
    """
    with explained():
        import time

        from stagecoach_cli.artifacts.collect import delete as delete_artifacts
        from stagecoach_cli.artifacts.collect import pointed, survey, unneeded
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.commands.artifact_location import WIDE, place
        from stagecoach_cli.display.numbers import DAY, size
        from stagecoach_cli.display.summary import print_titled

        choice = ClusterChoice(context, namespace)
        store = place(None, None, storage, endpoint, choice).store
        found = survey(store)  # before the roots: what becomes one meanwhile is seen
        roots = pointed(store) | used_here()
        if not no_cluster and (choice.is_given or store.local_path("artifacts") is None):
            roots |= used_on_cluster(choice, delete)
        now = time.time()
        garbage = unneeded(found, roots, now - older_than * DAY)
        total = f"{len(garbage)} of {len(found)} artifacts, {size(sum(item.size for item in garbage))}"
        if not garbage:
            click.echo(f"nothing to delete among {len(found)} artifacts in {store.uri}")
            return
        print_titled(console(WIDE), store.uri, garbage_table(garbage, now))
        if not delete:
            click.echo(f"{total} could be deleted; --delete does it")
            return
        for item in delete_artifacts(store, garbage):
            say(f"deleted {item.digest}")
        click.echo(f"{total} deleted")


def garbage_table(garbage: list[StoredArtifact], now: float) -> Table:
    """Return one row for each artifact, the oldest first."""
    from stagecoach_cli.display.numbers import duration, size
    from stagecoach_cli.display.summary import empty_table

    table = empty_table("Digest", "Kind", ">Objects", ">Size", ">Age")
    for item in garbage:
        kind = item.kind or "unfinished"
        table.add_row(item.digest, kind, str(item.num_objects), size(item.size), duration(max(0.0, now - item.newest)))
    return table


def used_here() -> set[str]:
    """Return the stage digests that runs of this folder have in use."""
    from stagecoach_cli.artifacts.collect import digests_of_record
    from stagecoach_local.workspace import here

    records = [record for run in here().known_runs() if (record := run.load()) is not None]
    return {digest for record in records for digest in digests_of_record(record)}


def used_on_cluster(choice: ClusterChoice, must_know: bool) -> set[str]:
    """Return the stage digests that a cluster's runs have in use; none where no cluster is configured.

    `must_know`: something is to be deleted, so a cluster that does not tell is an error. Raises Failure.
    """
    from stagecoach_cli.cluster.api import ClusterError, NotConfigured, NotInstalled, connect
    from stagecoach_cli.cluster.runs import digests_in_use

    try:
        api = connect(choice)
    except NotConfigured as error:
        if choice.is_given:
            raise
        say(f"no cluster was asked which artifacts its runs have in use ({error})")
        return set()
    try:
        bodies = api.runs(everywhere=choice.namespace is None)
        return {digest for body in bodies for digest in digests_in_use(body)}
    except NotInstalled:
        return set()
    except ClusterError as error:
        advice = (
            "give --namespace for one namespace's runs, or --no-cluster if none of the cluster's runs uses this storage"
        )
        if must_know:
            raise Failure(
                f"the cluster does not tell which artifacts are in use, so none is deleted: {error}\n{advice}"
            ) from error
        say(f"the cluster does not tell which artifacts are in use: {error}\n{advice}")
        return set()
