"""`stagecoach artifacts`: list, fetch, verify and trace what runs have made; delete what nothing needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.artifact_location import WIDE, chosen, place_of_artifact, place_of_run
from stagecoach_cli.commands.artifacts_gc import collect_garbage
from stagecoach_cli.commands.options import (
    Failure,
    cluster_options,
    console,
    endpoint_option,
    explained,
    storage_option,
)
from stagecoach_cli.exit_codes import EXIT_FAILED

if TYPE_CHECKING:
    from rich.tree import Tree

    from stagecoach_cli.artifacts.store import Ancestor


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
        from stagecoach_cli.artifacts.store import pointers
        from stagecoach_cli.display.numbers import short
        from stagecoach_cli.display.summary import empty_table, print_titled

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
        from stagecoach_cli.artifacts.store import fetch, find
        from stagecoach_cli.display.numbers import quantity

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
        from stagecoach_cli.artifacts.store import find
        from stagecoach_cli.artifacts.store import verify as verify_lineage
        from stagecoach_cli.display.numbers import quantity

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
        from stagecoach_cli.artifacts.store import find
        from stagecoach_cli.artifacts.store import lineage as trace

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

    from stagecoach_cli.display.numbers import duration, quantity, short

    name = item.key.removeprefix("stage:").removeprefix("uri:")
    if item.stage_digest is None:
        return escape(f"{name}  input {short(item.digest)}")
    if item.manifest is None:
        return escape(f"{name}  artifact {short(item.stage_digest)}: its manifest is gone")
    manifest = item.manifest
    tokens = f", {quantity(manifest.tokens)} tokens" if manifest.tokens else ""
    time = f", {duration(manifest.seconds)}" if manifest.seconds else ""
    return escape(f"{name}  {manifest.kind} {short(item.stage_digest)}{tokens}{time}")
