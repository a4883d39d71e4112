"""`stagecoach status`: how runs stand, from what their driver wrote down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import console, explained

if TYPE_CHECKING:
    from rich.table import Table

    from stagecoach_cli.view import Snapshot
    from stagecoach_cli.workspace import RunFolder, RunRecord


@click.command("status")
@click.argument("run", required=False)
def command(run: str | None) -> None:
    """Show how a run's stages stand; without RUN, all runs of this folder."""
    with explained():
        from stagecoach_cli.summary import print_failures
        from stagecoach_cli.view import render_rows
        from stagecoach_cli.workspace import here

        out = console()
        if run is None:
            known = here().known_runs()
            out.print(runs_table(known) if known else f"no runs in {here().root}")
            return
        folder = here().find(run)
        record = folder.load()
        if record is None:
            return
        snapshot = snapshot_of(folder, record)
        out.print(headline(folder, record), highlight=False, markup=False, soft_wrap=True)
        out.print(render_rows(snapshot, out.width, out.options.ascii_only))
        print_failures(out, snapshot)


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

    from stagecoach_cli.tail import ProgressTail
    from stagecoach_cli.view import LIVING, Snapshot, StageRow
    from stagecoach_core.values import Found, StageState, StageView

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


def runs_table(folders: list[RunFolder]) -> Table:
    """Return one row for each run of the workspace, the newest last."""
    import time

    from stagecoach_cli.summary import empty_table
    from stagecoach_cli.view import FINISHED

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
