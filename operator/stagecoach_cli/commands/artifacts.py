"""`stagecoach artifacts`: list, download, verify, trace and garbage-collect artifacts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from rich.table import Table
    from rich.tree import Tree

    from stagecoach_cli.artifacts.store import Ancestor, ListedArtifact

COLUMNS_BESIDE_NAMES = 60
"""Columns of a list of artifacts in addition to their names."""


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
@click.option(
    "--output",
    "-o",
    type=click.Choice(["table", "wide", "json"]),
    default="table",
    show_default=True,
    help="Format; wide adds content digests and URIs.",
)
def list_artifacts(
    what: str | None,
    storage: str | None,
    endpoint: str | None,
    context: str | None,
    namespace: str | None,
    output: str,
) -> None:
    """List the artifacts of a run, or of all runs.

    The run is given by its file or name. Without an argument, the artifacts of all runs in the storage are listed.
    """
    with report_errors():
        from stagecoach_cli.artifacts.store import list_all
        from stagecoach_cli.display.summary import print_titled

        location = locate_run(what, storage, endpoint, cluster_choice(context, namespace))
        found = list_all(location.store, location.name)
        if output == "json":
            click.echo(json.dumps([listed_json(item) for item in found], indent=2, ensure_ascii=False))
            return
        if not found:
            raise Failure(f"no artifacts of {what or 'any run'} in {location.store.uri}")
        wide = output == "wide"
        out = console(WIDE)
        print_titled(out, location.store.uri, artifacts_table(found, time.time(), wide, out.width))


def artifacts_table(found: list[ListedArtifact], now: float, wide: bool, width: int) -> Table:
    """Return a table with a line for each artifact.

    `wide`: with content digests and URIs. `width`: columns of the terminal; without room for it the kind is left out.
    """
    from stagecoach_cli.display.numbers import short
    from stagecoach_cli.display.summary import empty_table

    longest = max(len(item.pointer.full_name) for item in found)
    with_kind = wide or longest + COLUMNS_BESIDE_NAMES <= width
    more = ["Content", "URI"] if wide else []
    table = empty_table("Run/stage", *(["Kind"] if with_kind else []), ">Size", ">Tokens", ">Age", "Digest", *more)
    for item in found:
        pointer = item.pointer.pointer
        cells = [item.pointer.full_name, *([pointer.kind] if with_kind else []), *_amounts(item, now)]
        cells += [short(pointer.stage_digest), *([short(pointer.content_digest), pointer.uri] if wide else [])]
        table.add_row(*cells)
    for column in table.columns:
        column.no_wrap = True  # one line for each artifact: long names are cut
        column.overflow = "ellipsis"
    return table


def _amounts(item: ListedArtifact, now: float) -> tuple[str, str, str]:
    """Return an artifact's size, tokens and age."""
    from stagecoach_cli.display.numbers import duration, quantity, size

    manifest = item.manifest
    if manifest is None:
        return "deleted", "", ""
    tokens = quantity(manifest.tokens) if manifest.tokens else ""
    return size(item.num_bytes), tokens, duration(now - manifest.created)


def listed_json(item: ListedArtifact) -> dict[str, Any]:
    """Return an artifact as JSON values; what only its manifest has is null if that is deleted."""
    pointer, manifest = item.pointer.pointer, item.manifest
    return {
        "namespace": item.pointer.namespace,
        "run": item.pointer.run,
        "stage": pointer.stage,
        "kind": pointer.kind,
        "stageDigest": pointer.stage_digest,
        "contentDigest": pointer.content_digest,
        "uri": pointer.uri,
        "bytes": None if manifest is None else item.num_bytes,
        "tokens": None if manifest is None else manifest.tokens,
        "seconds": None if manifest is None else manifest.seconds,
        "created": None if manifest is None else manifest.created,
        "metrics": None if manifest is None else manifest.metrics,
    }


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
