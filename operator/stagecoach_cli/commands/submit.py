"""`stagecoach submit`: create or update a run on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.options import (
    Failure,
    InvalidInput,
    cluster_options,
    console,
    file_argument,
    report_errors,
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
@click.option("--storage", metavar="URI", help="Artifact storage instead of spec.storage.uri: s3://bucket/prefix.")
@cluster_options
@click.option(
    "--force-conflicts", is_flag=True, help="Take over fields owned by other field managers, such as kubectl."
)
@wait_option("the run is complete or has failed; the exit codes are those of `stagecoach run`")
def command(
    file: Path,
    overrides: tuple[str, ...],
    storage: str | None,
    context: str | None,
    namespace: str | None,
    force_conflicts: bool,
    wait: bool,
) -> int:
    """Create or update the run of FILE on a cluster.

    The file is first checked as by `stagecoach validate`, except for inputs: relative ones are resolved on the cluster,
    against spec.storage.inputs. It is applied by server-side apply: fields that the file does not set, such as
    spec.suspend, are not changed.
    """
    with report_errors():
        from stagecoach_api.names import API_GROUP, SINGULAR
        from stagecoach_cli.cluster.api import Changed, ClusterChoice, connect
        from stagecoach_local.prepare import check

        all_overrides = [*overrides, *([f"storage.uri={storage}"] if storage is not None else [])]
        loaded = check(file, all_overrides)
        api = connect(ClusterChoice(context, namespace))
        document = document_of(loaded, namespace, api.namespace)
        api = api.at(document["metadata"]["namespace"])
        try:
            _, is_new = api.apply_run(document, force_conflicts)
        except Changed as error:
            raise Failure(f"{error}\nuse --force-conflicts to take over these fields") from error
        name = document["metadata"]["name"]
        click.echo(f"{SINGULAR}.{API_GROUP}/{name} {'created' if is_new else 'configured'}")
        return follow(api, name) if wait else 0


def document_of(loaded: LoadedRun, namespace: str | None, default: str) -> dict[str, Any]:
    """Return the run as written, with the namespace of the command line, else of the file, else `default`."""
    document = dict(loaded.document)
    metadata = dict(document["metadata"])
    written = metadata.get("namespace")
    if None not in (namespace, written) and namespace != written:
        raise InvalidInput(f"{loaded.source} is for namespace `{written}`, but --namespace is `{namespace}`")
    metadata["namespace"] = namespace or written or default
    return {**document, "metadata": metadata}


def follow(api: ClusterApi, name: str) -> int:
    """Show the run until it is over; return the exit code."""
    import time

    from stagecoach_cli.cluster.runs import snapshot_of, warnings_of
    from stagecoach_cli.cluster.watch import watch
    from stagecoach_cli.display.live import open_view
    from stagecoach_cli.display.summary import print_failures, print_stages

    out = console()
    view = open_view(out)
    try:
        run = watch(api, name, lambda item: exit_code(item) is not None, view)
    finally:
        view.close()
    print_stages(out, snapshot_of(run, time.time()))
    for line in warnings_of(run):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    print_failures(out, snapshot_of(run, time.time()))
    code = exit_code(run)
    hint = f"; retry with `stagecoach resume {run.title}`" if code == EXIT_FAILED else ""
    out.print(f"{run.title}: {run.state.value.lower()}{hint}", highlight=False, markup=False, soft_wrap=True)
    return EXIT_FAILED if code is None else code


def exit_code(run: ClusterRun) -> int | None:
    """Return the exit code for a run that is over, suspended or rejected; None if it may still progress."""
    from stagecoach_api.status import ConditionType, Reason

    if run.is_true(ConditionType.COMPLETE):
        return 0
    if run.is_cancelled or run.is_true(ConditionType.SUSPENDED):
        return EXIT_INTERRUPTED
    if run.is_true(ConditionType.FAILED):
        return EXIT_FAILED
    rejection = run.rejection
    if rejection is not None and rejection.reason is not Reason.STORAGE_UNREACHABLE:
        return EXIT_INVALID
    return None
