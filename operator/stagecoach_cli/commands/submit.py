"""`stagecoach submit`: give a run to a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.options import (
    Failure,
    InvalidInput,
    cluster_options,
    console,
    explained,
    file_argument,
    set_option,
    wait_option,
)
from stagecoach_cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_INVALID

if TYPE_CHECKING:
    from stagecoach_api.reading.loading import LoadedRun
    from stagecoach_cli.cluster.api import ClusterApi
    from stagecoach_cli.cluster.runs import ClusterRun


@click.command("submit")
@file_argument
@set_option
@click.option("--storage", metavar="URI", help="Where artifacts lie, instead of spec.storage.uri: s3://bucket/prefix.")
@cluster_options
@click.option("--force-conflicts", is_flag=True, help="Take over fields that were set by other means, such as kubectl.")
@wait_option("the run is finished or has failed, with the exit codes of `stagecoach run`")
def command(
    file: Path,
    overrides: tuple[str, ...],
    storage: str | None,
    context: str | None,
    namespace: str | None,
    force_conflicts: bool,
    wait: bool,
) -> int:
    """Give a run to the cluster, or change the one of that name there.

    The file is checked as by `validate` first; relative inputs are looked for on the cluster's side, in
    spec.storage.inputs. What the file does not mention stays as it is there, such as a suspension.
    """
    with explained():
        from stagecoach_api.names import API_GROUP, SINGULAR
        from stagecoach_cli.cluster.api import Changed, ClusterChoice, connect
        from stagecoach_local.prepare import check

        given = [*overrides, *([f"storage.uri={storage}"] if storage is not None else [])]
        loaded = check(file, given, inputs=False)
        api = connect(ClusterChoice(context, namespace))
        document = document_of(loaded, namespace, api.namespace)
        api = api.at(document["metadata"]["namespace"])
        try:
            _, is_new = api.apply_run(document, force_conflicts)
        except Changed as error:
            raise Failure(f"{error}\nto take these fields over: --force-conflicts") from error
        name = document["metadata"]["name"]
        click.echo(f"{SINGULAR}.{API_GROUP}/{name} {'created' if is_new else 'configured'}")
        return follow(api, name) if wait else 0


def document_of(loaded: LoadedRun, namespace: str | None, default: str) -> dict[str, Any]:
    """Return what is applied: the run as written, in the namespace of the command line, of the file, or `default`."""
    document = dict(loaded.document)
    metadata = dict(document["metadata"])
    written = metadata.get("namespace")
    if None not in (namespace, written) and namespace != written:
        raise InvalidInput(f"{loaded.source} is for namespace `{written}`, and --namespace says `{namespace}`")
    metadata["namespace"] = namespace or written or default
    return {**document, "metadata": metadata}


def follow(api: ClusterApi, name: str) -> int:
    """Show the run until it is over; return the exit code."""
    import time

    from stagecoach_cli.cluster.runs import snapshot_of, troubles_of
    from stagecoach_cli.cluster.watch import watch
    from stagecoach_cli.display.live import open_view
    from stagecoach_cli.display.summary import print_failures

    out = console()
    view = open_view(out)
    try:
        run = watch(api, name, lambda item: exit_code(item) is not None, view)
    finally:
        view.close()
    for line in troubles_of(run):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    print_failures(out, snapshot_of(run, time.time()))
    code = exit_code(run)
    hint = f"; `stagecoach resume {run.title}` tries once more" if code == EXIT_FAILED else ""
    out.print(f"{run.title}: {run.state.value.lower()}{hint}", highlight=False, markup=False, soft_wrap=True)
    return EXIT_FAILED if code is None else code


def exit_code(run: ClusterRun) -> int | None:
    """Return what the command ends with. None: the run goes on, or waits for something that may come."""
    from stagecoach_api.status import ConditionType, Reason

    if run.holds(ConditionType.COMPLETE):
        return 0
    if run.is_cancelled or run.holds(ConditionType.SUSPENDED):
        return EXIT_INTERRUPTED
    if run.holds(ConditionType.FAILED):
        return EXIT_FAILED
    refusal = run.refusal
    if refusal is not None and refusal.reason is not Reason.STORAGE_UNREACHABLE:
        return EXIT_INVALID
    return None
