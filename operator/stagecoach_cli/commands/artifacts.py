"""`stagecoach artifacts`: list, fetch, verify and trace what runs have made; delete what nothing needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
from stagecoach_cli.main import EXIT_FAILED

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

    from stagecoach_api.store import Store
    from stagecoach_cli.artifacts import Ancestor
    from stagecoach_cli.cluster_api import ClusterChoice
    from stagecoach_cli.garbage import StoredArtifact

WIDE = 1000
"""Columns of a listing that nobody's terminal limits: a URI stays in one piece."""


@click.group("artifacts")
def command() -> None:
    """List, fetch, verify and trace what runs have made; delete what nothing needs.

    An artifact is named RUN/STAGE, NAMESPACE/RUN/STAGE, by its digest (or the digest's first digits), or by its URI.
    Without --storage it is looked for where the run of this folder keeps its artifacts, else in .stagecoach/store.
    """


@command.command("ls")
@click.argument("what", metavar="[FILE|RUN]", required=False)
@storage_option
@endpoint_option
def list_artifacts(what: str | None, storage: str | None, endpoint: str | None) -> None:
    """List the artifacts of a run, given by its file or its name; without either, of all runs in the storage."""
    with explained():
        from stagecoach_cli.artifacts import pointers
        from stagecoach_cli.figures import short
        from stagecoach_cli.summary import empty_table, print_titled

        place = place_of_run(what, storage, endpoint)
        table = empty_table("Run/stage", "Kind", "Digest", "Content", "URI")
        found = pointers(place.store, place.name)
        for item in found:
            name = item.name if item.namespace == "default" else f"{item.namespace}/{item.name}"
            pointer = item.pointer
            table.add_row(name, pointer.kind, short(pointer.stage_digest), short(pointer.content_digest), pointer.uri)
        if not found:
            raise Failure(f"no artifacts of {what or 'any run'} in {place.store.uri}")
        print_titled(console(WIDE), place.store.uri, table)


@command.command("get")
@click.argument("artifact")
@click.argument("destination", type=click.Path(path_type=Path))
@storage_option
@endpoint_option
def get(artifact: str, destination: Path, storage: str | None, endpoint: str | None) -> None:
    """Copy an artifact's files to a new folder; every byte is checked against its manifest."""
    with explained():
        from stagecoach_cli.artifacts import fetch, find
        from stagecoach_cli.figures import quantity

        place = place_of_artifact(artifact, storage, endpoint)
        count = size = 0
        for item, path in fetch(place.store, find(place.store, place.name or artifact), destination):
            count, size = count + 1, size + item.size
            click.echo(f"{path}  {quantity(item.size)}B", err=True)
        click.echo(f"{count} files, {quantity(size)}B, verified: {destination}")


@command.command("verify")
@click.argument("artifact")
@storage_option
@endpoint_option
def verify(artifact: str, storage: str | None, endpoint: str | None) -> int:
    """Hash everything again that an artifact's lineage names; name every object whose bytes have changed."""
    with explained():
        from stagecoach_cli.artifacts import find
        from stagecoach_cli.artifacts import verify as verify_lineage
        from stagecoach_cli.figures import quantity

        place = place_of_artifact(artifact, storage, endpoint)
        digest = find(place.store, place.name or artifact)
        faults = 0
        for checked in verify_lineage(place.store, digest, artifact, place.endpoint, place.region):
            word = "BAD" if checked.faults else "ok "
            plural = "s" * (checked.num_objects != 1)
            what = f"{checked.num_objects} object{plural}, {quantity(checked.num_bytes)}B"
            click.echo(f"{word} {checked.member.key}  {what}")
            for text in checked.faults:
                click.echo(f"    {text}")
            for text in checked.notes:
                click.echo(f"    note: {text}")
            faults += len(checked.faults)
        if faults:
            click.echo(f"{faults} fault{'s' * (faults != 1)}: {artifact} is not what its manifests say", err=True)
            return EXIT_FAILED
        click.echo(f"{artifact}: every byte is as its manifests say")
        return 0


@command.command("lineage")
@click.argument("artifact")
@storage_option
@endpoint_option
def lineage(artifact: str, storage: str | None, endpoint: str | None) -> None:
    """Draw what an artifact was made from."""
    with explained():
        from stagecoach_cli.artifacts import find
        from stagecoach_cli.artifacts import lineage as trace

        place = place_of_artifact(artifact, storage, endpoint)
        root = trace(place.store, find(place.store, place.name or artifact), artifact)
        console().print(lineage_tree(root), soft_wrap=True)


def lineage_tree(root: Ancestor) -> Tree:
    """Return a tree: an artifact, and below it what it was made from. What was drawn above is not drawn again."""
    from rich.tree import Tree

    seen: set[str] = set()

    def draw(item: Ancestor, tree: Tree) -> None:
        for parent in item.parents:
            mark = parent.stage_digest or ""
            again = mark in seen
            branch = tree.add(describe(parent) + (" (drawn above)" if again and parent.parents else ""))
            seen.add(mark)
            if not again:
                draw(parent, branch)

    tree = Tree(describe(root))
    draw(root, tree)
    return tree


def describe(item: Ancestor) -> str:
    """Return a member of a lineage in a line."""
    from rich.markup import escape

    from stagecoach_cli.figures import duration, quantity, short

    name = item.key.removeprefix("stage:").removeprefix("uri:")
    if item.stage_digest is None:
        return escape(f"{name}  input {short(item.digest)}")
    if item.manifest is None:
        return escape(f"{name}  artifact {short(item.stage_digest)}: its manifest is gone")
    manifest = item.manifest
    tokens = f", {quantity(manifest.tokens)} tokens" if manifest.tokens else ""
    time = f", {duration(manifest.seconds)}" if manifest.seconds else ""
    return escape(f"{name}  {manifest.kind} {short(item.stage_digest)}{tokens}{time}")


# -- what nothing needs ------------------------------------------------------------------------------------------------


@command.command("gc")
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

        from stagecoach_cli.cluster_api import ClusterChoice
        from stagecoach_cli.figures import DAY, size
        from stagecoach_cli.garbage import delete as delete_artifacts
        from stagecoach_cli.garbage import pointed, survey, unneeded
        from stagecoach_cli.summary import print_titled

        store = place(None, None, storage, endpoint).store
        choice = ClusterChoice(context, namespace)
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
    from stagecoach_cli.figures import duration, size
    from stagecoach_cli.summary import empty_table

    table = empty_table("Digest", "Kind", ">Objects", ">Size", ">Age")
    for item in garbage:
        kind = item.kind or "unfinished"
        table.add_row(item.digest, kind, str(item.num_objects), size(item.size), duration(max(0.0, now - item.newest)))
    return table


def used_here() -> set[str]:
    """Return the stage digests that runs of this folder have in use."""
    from stagecoach_cli.garbage import digests_of_record
    from stagecoach_cli.workspace import here

    records = [record for run in here().known_runs() if (record := run.load()) is not None]
    return {digest for record in records for digest in digests_of_record(record)}


def used_on_cluster(choice: ClusterChoice, must_know: bool) -> set[str]:
    """Return the stage digests that a cluster's runs have in use; none where no cluster is configured.

    `must_know`: something is to be deleted, so a cluster that does not tell is an error. Raises Failure.
    """
    from stagecoach_cli.cluster_api import ClusterError, NotConfigured, NotInstalled, connect
    from stagecoach_cli.cluster_run import digests_in_use

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


# -- which store -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A store, and how the thing asked for is called in it."""

    store: Store
    name: str | None = None
    """None: nothing in particular."""
    endpoint: str | None = None
    region: str | None = None


def place_of_run(what: str | None, storage: str | None, endpoint: str | None) -> Place:
    """Return the store of a run given by its file or its name. Raises InvalidRun, WorkspaceError."""
    from stagecoach_api.loading import load_run
    from stagecoach_cli.prepare import open_run_store
    from stagecoach_cli.workspace import here

    if what is not None and Path(what).is_file():
        loaded = load_run(Path(what))
        settings = loaded.run.spec.storage
        name = f"{loaded.run.metadata.namespace}/{loaded.run.metadata.name}"
        return Place(open_run_store(loaded, here(), storage), name, endpoint or settings.endpoint, settings.region)
    return place(what, what, storage, endpoint)


def place_of_artifact(artifact: str, storage: str | None, endpoint: str | None) -> Place:
    """Return the store of an artifact given by URI, by RUN/STAGE or by digest."""
    from stagecoach_cli.artifacts import split_uri

    parts = split_uri(artifact)
    if parts is not None:
        return place(None, parts[1], storage or parts[0], endpoint)
    run = artifact.rpartition("/")[0] or None
    return place(run, artifact, storage, endpoint)


def place(run: str | None, name: str | None, storage: str | None, endpoint: str | None) -> Place:
    """Return `storage` if given, else where the named run of this workspace keeps its artifacts, else the default."""
    from stagecoach_api.store import open_store
    from stagecoach_cli.workspace import WorkspaceError, here

    record = None
    if storage is None and run is not None:
        try:
            record = here().find(run).load()
        except WorkspaceError:
            record = None  # runs of other folders may lie in the default storage, too
    if record is not None:
        endpoint, region = endpoint or record.storage_endpoint, record.storage_region
        return Place(open_store(record.storage_uri, endpoint, region), name, endpoint, region)
    uri = str(here().default_storage) if storage is None else storage
    return Place(open_store(uri, endpoint), name, endpoint)
