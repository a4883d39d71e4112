"""`stagecoach artifacts`: list, fetch, verify and trace what runs have made; delete what nothing needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.garbage import collect_garbage
from stagecoach_cli.commands.options import (
    Failure,
    cluster_options,
    console,
    endpoint_option,
    explained,
    storage_option,
)
from stagecoach_cli.main import EXIT_FAILED

if TYPE_CHECKING:
    from rich.tree import Tree

    from stagecoach_api.store import Store
    from stagecoach_cli.artifacts import Ancestor
    from stagecoach_cli.cluster_api import ClusterChoice

WIDE = 1000
"""Columns of a listing that nobody's terminal limits: a URI stays in one piece."""


@click.group("artifacts")
def command() -> None:
    """List, fetch, verify and trace what runs have made; delete what nothing needs.

    An artifact is named RUN/STAGE, NAMESPACE/RUN/STAGE, by its digest (or the digest's first digits), or by its URI.
    Without --storage it is looked for where the run of this folder keeps its artifacts, else in .stagecoach/store, else
    where the cluster's run of that name keeps them (at once where --namespace or --context is given).
    """


command.add_command(collect_garbage)


@command.command("ls")
@click.argument("what", metavar="[FILE|RUN]", required=False)
@storage_option
@endpoint_option
@cluster_options
def list_artifacts(
    what: str | None, storage: str | None, endpoint: str | None, context: str | None, namespace: str | None
) -> None:
    """List the artifacts of a run, given by its file or its name; without either, of all runs in the storage."""
    with explained():
        from stagecoach_cli.artifacts import pointers
        from stagecoach_cli.figures import short
        from stagecoach_cli.summary import empty_table, print_titled

        place = place_of_run(what, storage, endpoint, chosen(context, namespace))
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
@cluster_options
def get(
    artifact: str,
    destination: Path,
    storage: str | None,
    endpoint: str | None,
    context: str | None,
    namespace: str | None,
) -> None:
    """Copy an artifact's files to a new folder; every byte is checked against its manifest."""
    with explained():
        from stagecoach_cli.artifacts import fetch, find
        from stagecoach_cli.figures import quantity

        place = place_of_artifact(artifact, storage, endpoint, chosen(context, namespace))
        count = size = 0
        for item, path in fetch(place.store, find(place.store, place.name or artifact), destination):
            count, size = count + 1, size + item.size
            click.echo(f"{path}  {quantity(item.size)}B", err=True)
        click.echo(f"{count} files, {quantity(size)}B, verified: {destination}")


@command.command("verify")
@click.argument("artifact")
@storage_option
@endpoint_option
@cluster_options
def verify(artifact: str, storage: str | None, endpoint: str | None, context: str | None, namespace: str | None) -> int:
    """Hash everything again that an artifact's lineage names; name every object whose bytes have changed."""
    with explained():
        from stagecoach_cli.artifacts import find
        from stagecoach_cli.artifacts import verify as verify_lineage
        from stagecoach_cli.figures import quantity

        place = place_of_artifact(artifact, storage, endpoint, chosen(context, namespace))
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
@cluster_options
def lineage(
    artifact: str, storage: str | None, endpoint: str | None, context: str | None, namespace: str | None
) -> None:
    """Draw what an artifact was made from."""
    with explained():
        from stagecoach_cli.artifacts import find
        from stagecoach_cli.artifacts import lineage as trace

        place = place_of_artifact(artifact, storage, endpoint, chosen(context, namespace))
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


# -- which store -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A store, and how the thing asked for is called in it."""

    store: Store
    name: str | None = None
    """None: nothing in particular."""
    endpoint: str | None = None
    region: str | None = None


def chosen(context: str | None, namespace: str | None) -> ClusterChoice:
    from stagecoach_cli.cluster_api import ClusterChoice

    return ClusterChoice(context, namespace)


def place_of_run(what: str | None, storage: str | None, endpoint: str | None, choice: ClusterChoice) -> Place:
    """Return the store of a run given by its file or its name. Raises InvalidRun, WorkspaceError, ClusterError."""
    from stagecoach_api.loading import load_run
    from stagecoach_cli.prepare import open_run_store
    from stagecoach_cli.workspace import here

    if what is not None and Path(what).is_file():
        loaded = load_run(Path(what))
        settings = loaded.run.spec.storage
        name = f"{loaded.run.metadata.namespace}/{loaded.run.metadata.name}"
        return Place(open_run_store(loaded, here(), storage), name, endpoint or settings.endpoint, settings.region)
    return place(what, what, storage, endpoint, choice)


def place_of_artifact(artifact: str, storage: str | None, endpoint: str | None, choice: ClusterChoice) -> Place:
    """Return the store of an artifact given by URI, by RUN/STAGE or by digest."""
    from stagecoach_cli.artifacts import split_uri

    parts = split_uri(artifact)
    if parts is not None:
        return place(None, parts[1], storage or parts[0], endpoint, choice)
    run = artifact.rpartition("/")[0] or None
    return place(run, artifact, storage, endpoint, choice)


def place(run: str | None, name: str | None, storage: str | None, endpoint: str | None, choice: ClusterChoice) -> Place:
    """Return `storage` if given, else where the named run of this workspace keeps its artifacts, else the default where
    that knows the run, else where the cluster's run keeps them."""
    from stagecoach_api.store import open_store
    from stagecoach_cli.artifacts import pointers
    from stagecoach_cli.workspace import here
    from stagecoach_cli.worlds import local_run

    if storage is not None:
        return Place(open_store(storage, endpoint), name, endpoint)
    folder = None if run is None else local_run(run, choice)
    record = None if folder is None else folder.load()
    if record is not None:
        endpoint, region = endpoint or record.storage_endpoint, record.storage_region
        return Place(open_store(record.storage_uri, endpoint, region), name, endpoint, region)
    default = open_store(str(here().default_storage), endpoint)
    if run is None or (not choice.is_given and pointers(default, run)):  # runs without a record may lie there, too
        return Place(default, name, endpoint)
    return place_on_cluster(run, name, endpoint, choice) or Place(default, name, endpoint)


def place_on_cluster(run: str, name: str | None, endpoint: str | None, choice: ClusterChoice) -> Place | None:
    """Return where a cluster's run keeps its artifacts; None where no cluster is configured.

    An artifact goes by its digest then, which the run's status names even where no pointers could be written.
    """
    from stagecoach_api.store import open_store
    from stagecoach_cli.cluster_api import NotConfigured
    from stagecoach_cli.cluster_run import cluster_run
    from stagecoach_cli.workspace import UnknownRun
    from stagecoach_cli.worlds import cluster_of

    try:
        api, own_name = cluster_of(run, choice)
    except (NotConfigured, UnknownRun):
        if choice.is_given:
            raise
        return None
    found = cluster_run(api.run(own_name))
    settings = found.storage
    if settings is None or settings.uri is None:
        raise Failure(f"{found.title} has made nothing yet in the operator's storage; name that by --storage")
    endpoint = endpoint or settings.endpoint
    stage = (name or "").removeprefix(run).strip("/")
    made = next((item.artifact for item in found.status.stages if item.name == stage), None)
    known = f"{found.title}/{stage}" if stage else found.title
    return Place(
        store=open_store(settings.uri, endpoint, settings.region),
        name=known if made is None else made.stage_digest,
        endpoint=endpoint,
        region=settings.region,
    )
