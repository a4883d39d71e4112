"""`stagecoach artifacts gc`: delete artifacts that nothing needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import (
    Failure,
    cluster_options,
    console,
    endpoint_option,
    notify,
    report_errors,
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
    help="Keep artifacts with an object younger than this: an attempt may be writing them.",
)
@click.option("--delete", is_flag=True, help="Delete the artifacts; without this option they are only listed.")
@cluster_options
@click.option("--no-cluster", is_flag=True, help="Do not ask a cluster which artifacts its runs use.")
def collect_garbage(
    storage: str | None,
    endpoint: str | None,
    older_than: float,
    delete: bool,
    context: str | None,
    namespace: str | None,
    no_cluster: bool,
) -> None:
    """List or delete artifacts that nothing needs.

    An artifact is needed if a pointer (runs/ in the storage) or a run of this folder or of the cluster names it, if it
    is recent, or if a needed artifact was made from it. The cluster is asked if the storage is S3: about all
    namespaces, or about --namespace. Do not use --delete while a run is being submitted that could reuse an artifact
    from the cache.
    """
    with report_errors():
        import time

        from stagecoach_cli.artifacts.collect import delete as delete_artifacts
        from stagecoach_cli.artifacts.collect import pointer_targets, survey, unneeded
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.commands.artifact_location import WIDE, locate
        from stagecoach_cli.display.numbers import DAY, size
        from stagecoach_cli.display.summary import print_titled

        choice = ClusterChoice(context, namespace)
        store = locate(None, None, storage, endpoint, choice).store
        found = survey(store)  # before the roots are read, so that an artifact that becomes one meanwhile is kept
        roots = pointer_targets(store) | digests_used_locally()
        if not no_cluster and (choice.is_given or store.local_path("artifacts") is None):
            roots |= digests_used_on_cluster(choice, delete)
        now = time.time()
        garbage = unneeded(found, roots, now - older_than * DAY)
        total = f"{len(garbage)} of {len(found)} artifacts, {size(sum(item.size for item in garbage))}"
        if not garbage:
            click.echo(f"nothing to delete among {len(found)} artifacts in {store.uri}")
            return
        print_titled(console(WIDE), store.uri, garbage_table(garbage, now))
        if not delete:
            click.echo(f"{total} can be deleted; use --delete to delete them")
            return
        for item in delete_artifacts(store, garbage):
            notify(f"deleted {item.digest}")
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


def digests_used_locally() -> set[str]:
    """Return the stage digests that runs of this folder use."""
    from stagecoach_cli.artifacts.collect import digests_of_record
    from stagecoach_local.workspace import current_workspace

    records = [record for run in current_workspace().known_runs() if (record := run.load()) is not None]
    return {digest for record in records for digest in digests_of_record(record)}


def digests_used_on_cluster(choice: ClusterChoice, required: bool) -> set[str]:
    """Return the stage digests that a cluster's runs use; none if no cluster is configured.

    `required`: raise Failure if the cluster cannot be queried, because artifacts are going to be deleted.
    """
    from stagecoach_cli.cluster.api import ClusterError, NotConfigured, NotInstalled, connect
    from stagecoach_cli.cluster.runs import digests_in_use

    try:
        api = connect(choice)
    except NotConfigured as error:
        if choice.is_given:
            raise
        notify(f"artifacts in use on a cluster are not known ({error})")
        return set()
    try:
        bodies = api.runs(everywhere=choice.namespace is None)
        return {digest for body in bodies for digest in digests_in_use(body)}
    except NotInstalled:
        return set()
    except ClusterError as error:
        advice = "give --namespace to ask about one namespace only, or --no-cluster if no run there uses this storage"
        problem = f"the cluster cannot be asked which artifacts are in use: {error}\n{advice}"
        if required:
            raise Failure(f"nothing is deleted, because {problem}") from error
        notify(problem)
        return set()
