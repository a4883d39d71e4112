"""`stagecoach artifacts`: list, download, verify, trace and garbage-collect artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.artifact_location import WIDE, cluster_choice, locate_artifact, locate_run
from stagecoach_cli.commands.artifacts_gc import collect_garbage
from stagecoach_cli.commands.options import (
    Failure,
    cluster_options,
    console,
    endpoint_option,
    report_errors,
    storage_option,
)
from stagecoach_cli.exit_codes import EXIT_FAILED

if TYPE_CHECKING:
    from rich.tree import Tree

    from stagecoach_cli.artifacts.store import Ancestor


@click.group("artifacts")
def command() -> None:
    """List, download, verify, trace and delete artifacts.

    An artifact is given as RUN/STAGE, NAMESPACE/RUN/STAGE, its stage digest or at least 6 leading digits of it, or its
    URI. Without --storage it is looked up in the storage of this folder's run, then in .stagecoach/store, then in the
    storage of the cluster's run of that name (only there if --namespace or --context is given).
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
    """List the artifacts of a run, or of all runs.

    The run is given by its file or name. Without an argument, the artifacts of all runs in the storage are listed.
    """
    with report_errors():
        from stagecoach_cli.artifacts.store import pointers
        from stagecoach_cli.display.numbers import short
        from stagecoach_cli.display.summary import empty_table, print_titled

        location = locate_run(what, storage, endpoint, cluster_choice(context, namespace))
        table = empty_table("Run/stage", "Kind", "Digest", "Content", "URI")
        found = pointers(location.store, location.name)
        for item in found:
            name = item.name if item.namespace == "default" else f"{item.namespace}/{item.name}"
            pointer = item.pointer
            table.add_row(name, pointer.kind, short(pointer.stage_digest), short(pointer.content_digest), pointer.uri)
        if not found:
            raise Failure(f"no artifacts of {what or 'any run'} in {location.store.uri}")
        print_titled(console(WIDE), location.store.uri, table)


@command.command("get")
@click.argument("artifact")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--as-stored", is_flag=True, help="Download an adapter without its base and leave its files unchanged.")
@storage_option
@endpoint_option
@cluster_options
def get(
    artifact: str,
    destination: Path,
    as_stored: bool,
    storage: str | None,
    endpoint: str | None,
    context: str | None,
    namespace: str | None,
) -> None:
    """Download and verify an artifact's files.

    DESTINATION must be a new or empty folder. Every file is checked against the artifact's manifest. The base of an
    adapter is downloaded to DESTINATION/base, and its path written to the copy's adapter_config.json, where PEFT looks
    for it.
    """
    with report_errors():
        from stagecoach_cli.artifacts.adapter_base import add_base
        from stagecoach_cli.artifacts.store import fetch, find
        from stagecoach_cli.display.numbers import quantity

        location = locate_artifact(artifact, storage, endpoint, cluster_choice(context, namespace))
        count = size = 0
        for item, path in fetch(location.store, find(location.store, location.name or artifact), destination):
            count, size = count + 1, size + item.size
            click.echo(f"{path}  {quantity(item.size)}B", err=True)
        click.echo(f"{count} file{'s' * (count != 1)}, {quantity(size)}B, verified: {destination}")
        about_base = None if as_stored else add_base(location.store, destination, location.endpoint, location.region)
        if about_base is not None:
            click.echo(about_base)


@command.command("verify")
@click.argument("artifact")
@storage_option
@endpoint_option
@cluster_options
def verify(artifact: str, storage: str | None, endpoint: str | None, context: str | None, namespace: str | None) -> int:
    """Verify an artifact and all its ancestors.

    Every object is hashed again; those that do not match their manifest are reported.
    """
    with report_errors():
        from stagecoach_cli.artifacts.store import find
        from stagecoach_cli.artifacts.store import verify as verify_lineage
        from stagecoach_cli.display.numbers import quantity

        location = locate_artifact(artifact, storage, endpoint, cluster_choice(context, namespace))
        digest = find(location.store, location.name or artifact)
        faults = 0
        for result in verify_lineage(location.store, digest, artifact, location.endpoint, location.region):
            verdict = "BAD" if result.faults else "ok "
            plural = "s" * (result.num_objects != 1)
            amount = f"{result.num_objects} object{plural}, {quantity(result.num_bytes)}B"
            click.echo(f"{verdict} {result.member.key}  {amount}")
            for text in result.faults:
                click.echo(f"    {text}")
            for text in result.notes:
                click.echo(f"    note: {text}")
            faults += len(result.faults)
        if faults:
            click.echo(f"{artifact}: {faults} error{'s' * (faults != 1)}, see above", err=True)
            return EXIT_FAILED
        click.echo(f"{artifact}: all objects match their manifests")
        return 0


@command.command("lineage")
@click.argument("artifact")
@storage_option
@endpoint_option
@cluster_options
def lineage(
    artifact: str, storage: str | None, endpoint: str | None, context: str | None, namespace: str | None
) -> None:
    """Show what an artifact was made from, as a tree."""
    with report_errors():
        from stagecoach_cli.artifacts.store import find
        from stagecoach_cli.artifacts.store import lineage as trace

        location = locate_artifact(artifact, storage, endpoint, cluster_choice(context, namespace))
        root = trace(location.store, find(location.store, location.name or artifact), artifact)
        console().print(lineage_tree(root), soft_wrap=True)


def lineage_tree(root: Ancestor) -> Tree:
    """Return an artifact's lineage as a tree; a repeated node is drawn without its ancestors."""
    from rich.tree import Tree

    seen: set[str] = set()

    def draw(item: Ancestor, tree: Tree) -> None:
        for parent in item.parents:
            identity = parent.stage_digest or ""
            is_repeated = identity in seen
            branch = tree.add(describe(parent) + (" (see above)" if is_repeated and parent.parents else ""))
            seen.add(identity)
            if not is_repeated:
                draw(parent, branch)

    tree = Tree(describe(root))
    draw(root, tree)
    return tree


def describe(item: Ancestor) -> str:
    """Return a one-line description of a node."""
    from rich.markup import escape

    from stagecoach_cli.display.numbers import duration, quantity, short

    name = item.key.removeprefix("stage:").removeprefix("uri:")
    if item.stage_digest is None:
        return escape(f"{name}  input {short(item.digest)}")
    if item.manifest is None:
        return escape(f"{name}  artifact {short(item.stage_digest)}: its manifest is missing")
    manifest = item.manifest
    tokens = f", {quantity(manifest.tokens)} tokens" if manifest.tokens else ""
    time = f", {duration(manifest.seconds)}" if manifest.seconds else ""
    return escape(f"{name}  {manifest.kind} {short(item.stage_digest)}{tokens}{time}")
