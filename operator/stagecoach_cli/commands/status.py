"""`stagecoach status`: the state of local runs, from their drivers' records, and of runs on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import (
    TARGET_RULE,
    InvalidInput,
    cluster_options,
    console,
    output_option,
    report_errors,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stagecoach_cli.cluster.api import Body, ClusterChoice
    from stagecoach_cli.cluster.runs import ClusterRun
    from stagecoach_cli.display.reports import StageReport
    from stagecoach_core.snapshot import Snapshot
    from stagecoach_local.workspace import RunFolder, RunRecord

WATCH_SECONDS = 1.0
LONG_WAIT = 60
"""A wait reason with more characters is repeated below the table, which may truncate it."""


@click.command(
    "status",
    help=f"""Show the state of a run's stages. Without RUN, list the runs of this folder, or if there are none, of the
    cluster's namespace.

    For a run on a cluster, conditions that need attention are shown below the table with their full message.

    {TARGET_RULE}""",
)
@click.argument("run", required=False)
@cluster_options
@click.option("--watch", "-w", is_flag=True, help="Keep showing the run until it is over.")
@output_option
def command(run: str | None, context: str | None, namespace: str | None, watch: bool, output: str) -> None:
    with report_errors():
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.target import local_run

        choice = ClusterChoice(context, namespace)
        out = console()
        if output == "json":
            if run is None or watch:
                raise InvalidInput("-o json shows one RUN as it is now; give its name, without --watch")
            print_json(run, choice)
            return
        if run is None:
            show_all(out, choice)
            return
        folder = local_run(run, choice)
        if folder is None:
            show_cluster(out, run, choice, watch)
        elif watch:
            watch_local(out, folder)
        else:
            show_local(out, folder)


def print_json(run: str, choice: ClusterChoice) -> None:
    """Print the state of one run as a JSON object."""
    import json
    import time

    from stagecoach_cli.cluster.runs import cluster_run, snapshot_of, stage_reports, warnings_of
    from stagecoach_cli.display.as_json import snapshot_json
    from stagecoach_cli.target import cluster_of, local_run

    folder = local_run(run, choice)
    record = None if folder is None else folder.load()
    if folder is not None and record is not None:
        state = state_text(folder, record).split(" (")[0]
        found = snapshot_json(record.namespace, state, local_snapshot(folder, record), (), reports_of(record))
    else:
        api, name = cluster_of(run, choice)
        of_cluster = cluster_run(api.run(name))
        snapshot = snapshot_of(of_cluster, time.time())
        state = cluster_state_text(of_cluster)
        found = snapshot_json(of_cluster.namespace, state, snapshot, warnings_of(of_cluster), stage_reports(of_cluster))
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))


# -- local runs --------------------------------------------------------------------------------------------------------


def show_local(out: Console, folder: RunFolder) -> None:
    from stagecoach_cli.display.summary import print_failures, print_stages, print_warnings

    record = folder.load()
    if record is None:
        return
    snapshot = local_snapshot(folder, record)
    out.print(headline(folder, record), highlight=False, markup=False, soft_wrap=True)
    print_stages(out, snapshot)
    print_warnings(out, reports_of(record))
    print_failures(out, snapshot)


def reports_of(record: RunRecord) -> dict[str, StageReport]:
    """Return the reports of a local run's finished stages; none if its store cannot be read."""
    from stagecoach_api.status import FINISHED
    from stagecoach_api.store import StoreError, open_store
    from stagecoach_cli.display.reports import find_reports

    digests = {name: stage.digest for name, stage in record.stages.items() if stage.state in FINISHED and stage.digest}
    try:
        store = open_store(record.storage_uri, record.storage_endpoint, record.storage_region)
        return find_reports(store, digests)
    except StoreError:
        return {}


def watch_local(out: Console, folder: RunFolder) -> None:
    """Show the run until its driver has ended."""
    import time

    from stagecoach_cli.display.live import open_view

    view = open_view(out)
    try:
        while folder.is_locked:
            record = folder.load()
            if record is not None:
                view.show(local_snapshot(folder, record))
            time.sleep(WATCH_SECONDS)
    finally:
        view.close()
    show_local(out, folder)


def headline(folder: RunFolder, record: RunRecord) -> str:
    """Return a line with the run's name, state and storage."""
    return f"{record.namespace}/{record.run}: {state_text(folder, record)}  {record.storage_uri}"


def state_text(folder: RunFolder, record: RunRecord) -> str:
    """Return the run's state; a run recorded as progressing without a live driver is interrupted."""
    from stagecoach_core.values import RunState

    if record.state is RunState.PROGRESSING and not folder.is_locked:
        from stagecoach_cli.display.advice import run_command

        again = run_command(Path(record.file), record.invocation)
        return f"interrupted (no driver is running; resume with `{again}`)"
    return record.state.value.lower()


def local_snapshot(folder: RunFolder, record: RunRecord) -> Snapshot:
    """Return the run's snapshot from its record and progress files."""
    import time

    from stagecoach_api.progress import Pace
    from stagecoach_api.status import LIVING
    from stagecoach_core.snapshot import Snapshot, StageRow
    from stagecoach_core.values import Found, StageState, StageView
    from stagecoach_local.tail import ProgressTail

    attempts = {(item.stage, item.number): item for item in record.attempts}
    locked = folder.is_locked
    rows = []
    for name, stage in record.stages.items():
        attempt = folder.attempt(name, stage.attempt)
        is_live = stage.state in LIVING
        artifact = None
        if stage.digest is not None and stage.content_digest is not None and stage.uri is not None:
            artifact = Found(stage.digest, stage.content_digest, stage.uri)
        view = StageView(
            state=stage.state if locked or not is_live else StageState.PENDING,
            digest=stage.digest,
            artifact=artifact,
            attempt=stage.attempt,
            restarts=stage.restarts,
            waiting_for=stage.waiting_for if locked or not is_live else "the run to be resumed",
            message=stage.message,
        )
        newest = attempts.get((name, stage.attempt))
        events = ProgressTail(attempt.progress).added() if is_live and stage.attempt else []
        pace = Pace()
        for event in events:
            pace.add(event)
        rows.append(
            StageRow(
                name=name,
                kind=stage.kind,
                view=view,
                progress=events[-1] if events else None,
                started=None if newest is None else newest.started,
                eta=pace.end(),
                resumed_from=None if newest is None else newest.resumed_from,
                saved_step=None if newest is None or newest.ended is None else newest.last_step,
                seconds=stage.seconds,
                ranks=stage.ranks,
                log=attempt.log if stage.attempt else None,
            )
        )
    return Snapshot(record.run, record.storage_uri, record.state, time.time(), tuple(rows), record.message)


# -- runs of a cluster -------------------------------------------------------------------------------------------------


def show_cluster(out: Console, name: str, choice: ClusterChoice, watch: bool) -> None:
    from stagecoach_cli.cluster.runs import cluster_run
    from stagecoach_cli.cluster.watch import watch as watch_run
    from stagecoach_cli.display.live import open_view
    from stagecoach_cli.target import cluster_of

    api, name = cluster_of(name, choice)
    if not watch:
        print_cluster(out, cluster_run(api.run(name)))
        return
    view = open_view(out)
    try:
        run = watch_run(api, name, lambda item: item.is_over, view)
    finally:
        view.close()
    print_cluster(out, run)


def cluster_state_text(run: ClusterRun) -> str:
    """Return the run's state, `not accepted` if the operator rejects its spec."""
    return run.state.value.lower() if run.rejection is None else "not accepted"


def print_cluster(out: Console, run: ClusterRun) -> None:
    """Print a cluster's run: state, stages, warnings and failures."""
    import time

    from stagecoach_cli.cluster.runs import snapshot_of, stage_reports, warnings_of
    from stagecoach_cli.display.summary import print_failures, print_stages, print_warnings

    snapshot = snapshot_of(run, time.time())
    state = cluster_state_text(run)
    out.print(f"{run.title}: {state}  {snapshot.storage}".rstrip(), highlight=False, markup=False, soft_wrap=True)
    print_stages(out, snapshot)
    warnings = warnings_of(run)
    waits = [(row.name, row.view.waiting_for) for row in snapshot.rows]
    long_waits = [item for item in waits if len(item[1]) > LONG_WAIT and not any(item[1] in line for line in warnings)]
    for line in [*(f"{name}: waiting for {reason}" for name, reason in long_waits), *warnings]:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    print_warnings(out, stage_reports(run))
    print_failures(out, snapshot)


# -- lists of runs -----------------------------------------------------------------------------------------------------


def show_all(out: Console, choice: ClusterChoice) -> None:
    """List the runs of this folder; if there are none, or a cluster is selected, those of the cluster's namespace."""
    from stagecoach_cli.cluster.api import NotConfigured, connect
    from stagecoach_local.workspace import current_workspace

    folders = [] if choice.is_given else current_workspace().known_runs()
    if folders:
        out.print(runs_table(folders))
        return
    no_local_runs = f"no runs in {current_workspace().root}"
    try:
        api = connect(choice)
    except NotConfigured:
        if choice.is_given:
            raise
        out.print(no_local_runs)
        return
    runs = api.runs()
    if runs:
        out.print(cluster_table(runs))
        return
    no_cluster_runs = f"no runs in namespace {api.namespace} of {api.server}"
    out.print(no_cluster_runs if choice.is_given else f"{no_local_runs}, and {no_cluster_runs}")


def runs_table(folders: list[RunFolder]) -> Table:
    """Return one row for each run of the workspace, the newest last."""
    import time

    from stagecoach_api.status import FINISHED
    from stagecoach_cli.display.summary import empty_table

    records = [(folder, record) for folder in folders if (record := folder.load()) is not None]
    records.sort(key=lambda item: item[1].updated)
    table = empty_table("Run", "State", ">Stages", "Updated", "File")
    for folder, record in records:
        finished = sum(stage.state in FINISHED for stage in record.stages.values())
        updated = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.updated))
        name = f"{record.namespace}/{record.run}"
        state = state_text(folder, record).split(" (")[0]
        table.add_row(name, state, f"{finished}/{len(record.stages)}", updated, record.file)
    return table


def cluster_table(bodies: list[Body]) -> Table:
    """Return one row for each run of a cluster, the newest last."""
    from stagecoach_cli.cluster.runs import cluster_run
    from stagecoach_cli.display.summary import empty_table

    table = empty_table("Run", "State", "Stage", ">Progress", ">Restarts", "Created")
    for body in sorted(bodies, key=lambda item: str(item["metadata"].get("creationTimestamp", ""))):
        run = cluster_run(body)
        summary = run.status.summary
        state = cluster_state_text(run)
        cells = ("", "", "") if summary is None else (summary.stage, summary.progress, str(summary.restarts))
        table.add_row(run.title, state, *cells, str(body["metadata"].get("creationTimestamp", "")))
    return table
