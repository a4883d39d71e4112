"""`stagecoach status`: how runs stand; of this folder from what their driver wrote down, of a cluster from its API."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import WHICH_WORLD, cluster_options, console, explained

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stagecoach_cli.cluster.api import Body, ClusterChoice
    from stagecoach_cli.cluster.runs import ClusterRun
    from stagecoach_core.snapshot import Snapshot
    from stagecoach_local.workspace import RunFolder, RunRecord

WATCH_SECONDS = 1.0
LONG_WAIT = 60
"""What a stage waits for is told below the table too where it has more characters: the table may cut it."""


@click.command(
    "status",
    help=f"""Show how a run's stages stand; without RUN, all runs of this folder, else all of the cluster's namespace.

    Of a cluster's run every condition that is not as it should be is told below the table, word for word.

    {WHICH_WORLD}""",
)
@click.argument("run", required=False)
@cluster_options
@click.option("--watch", "-w", is_flag=True, help="Go on showing it until the run is over.")
def command(run: str | None, context: str | None, namespace: str | None, watch: bool) -> None:
    with explained():
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.target import local_run

        choice = ClusterChoice(context, namespace)
        out = console()
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


# -- of this folder ----------------------------------------------------------------------------------------------------


def show_local(out: Console, folder: RunFolder) -> None:
    from stagecoach_cli.display.live import render_rows
    from stagecoach_cli.display.summary import print_failures

    record = folder.load()
    if record is None:
        return
    snapshot = snapshot_of(folder, record)
    out.print(headline(folder, record), highlight=False, markup=False, soft_wrap=True)
    out.print(render_rows(snapshot, out.width, out.options.ascii_only))
    print_failures(out, snapshot)


def watch_local(out: Console, folder: RunFolder) -> None:
    """Show the run until no driver works on it."""
    import time

    from stagecoach_cli.display.live import open_view

    view = open_view(out)
    try:
        while folder.is_locked:
            record = folder.load()
            if record is not None:
                view.show(snapshot_of(folder, record))
            time.sleep(WATCH_SECONDS)
    finally:
        view.close()
    show_local(out, folder)


def headline(folder: RunFolder, record: RunRecord) -> str:
    """Return the run's state in a line."""
    return f"{record.namespace}/{record.run}: {state_word(folder, record)}  {record.storage_uri}"


def state_word(folder: RunFolder, record: RunRecord) -> str:
    """Return the run's state; a run that says it progresses needs a driver that lives."""
    from stagecoach_core.values import RunState

    if record.state is RunState.PROGRESSING and not folder.is_locked:
        return f"interrupted (no driver works on it; go on with `stagecoach run {record.file}`)"
    return record.state.value.lower()


def snapshot_of(folder: RunFolder, record: RunRecord) -> Snapshot:
    """Return the run as its record and its progress files tell it."""
    import time

    from stagecoach_api.status import LIVING
    from stagecoach_core.snapshot import Snapshot, StageRow
    from stagecoach_core.values import Found, StageState, StageView
    from stagecoach_local.tail import ProgressTail

    started = {(item.stage, item.number): item.started for item in record.attempts}
    locked = folder.is_locked
    rows = []
    for name, stage in record.stages.items():
        attempt = folder.attempt(name, stage.attempt)
        living = stage.state in LIVING
        artifact = None
        if stage.digest is not None and stage.content_digest is not None and stage.uri is not None:
            artifact = Found(stage.digest, stage.content_digest, stage.uri)
        view = StageView(
            state=stage.state if locked or not living else StageState.PENDING,
            digest=stage.digest,
            artifact=artifact,
            attempt=stage.attempt,
            restarts=stage.restarts,
            waiting_for=stage.waiting_for if locked or not living else "the run to be taken up again",
            message=stage.message,
        )
        rows.append(
            StageRow(
                name=name,
                kind=stage.kind,
                view=view,
                progress=ProgressTail(attempt.progress).newest() if living and stage.attempt else None,
                started=started.get((name, stage.attempt)),
                seconds=stage.seconds,
                ranks=stage.ranks,
                log=attempt.log if stage.attempt else None,
            )
        )
    return Snapshot(record.run, record.storage_uri, record.state, time.time(), tuple(rows), record.message)


# -- of a cluster ------------------------------------------------------------------------------------------------------


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


def print_cluster(out: Console, run: ClusterRun) -> None:
    """Print a cluster's run: state, stages, what is out of order, failures."""
    import time

    from stagecoach_cli.cluster.runs import snapshot_of, troubles_of
    from stagecoach_cli.display.live import render_rows
    from stagecoach_cli.display.summary import print_failures

    snapshot = snapshot_of(run, time.time())
    state = run.state.value.lower() if run.refusal is None else "not accepted"
    out.print(f"{run.title}: {state}  {snapshot.storage}".rstrip(), highlight=False, markup=False, soft_wrap=True)
    out.print(render_rows(snapshot, out.width, out.options.ascii_only))
    troubles = troubles_of(run)
    waits = [(row.name, row.view.waiting_for) for row in snapshot.rows]
    untold = [item for item in waits if len(item[1]) > LONG_WAIT and not any(item[1] in line for line in troubles)]
    for line in [*(f"{name} waits for {words}" for name, words in untold), *troubles]:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    print_failures(out, snapshot)


# -- all of them -------------------------------------------------------------------------------------------------------


def show_all(out: Console, choice: ClusterChoice) -> None:
    """Print the runs of this folder; where there are none, or a cluster is asked for, the cluster's."""
    from stagecoach_cli.cluster.api import NotConfigured, connect
    from stagecoach_local.workspace import here

    known = [] if choice.is_given else here().known_runs()
    if known:
        out.print(runs_table(known))
        return
    nothing = f"no runs in {here().root}"
    try:
        api = connect(choice)
    except NotConfigured:
        if choice.is_given:
            raise
        out.print(nothing)
        return
    runs = api.runs()
    if runs:
        out.print(cluster_table(runs))
        return
    out.print(("" if choice.is_given else f"{nothing}, and ") + f"no runs in namespace {api.namespace} of {api.server}")


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
        state = state_word(folder, record).split(" (")[0]
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
        state = run.state.value.lower() if run.refusal is None else "not accepted"
        told = ("", "", "") if summary is None else (summary.stage, summary.progress, str(summary.restarts))
        table.add_row(run.title, state, *told, str(body["metadata"].get("creationTimestamp", "")))
    return table
