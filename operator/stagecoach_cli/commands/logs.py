"""`stagecoach logs`: what an attempt has written."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import explained

if TYPE_CHECKING:
    from stagecoach_cli.workspace import AttemptRecord, RunFolder

POLL_SECONDS = 0.3
CHUNK_BYTES = 1 << 16


@click.command("logs")
@click.argument("run")
@click.argument("stage", required=False)
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Default: the newest.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the attempt has ended.")
def command(run: str, stage: str | None, attempt: int | None, follow: bool) -> None:
    """Print the log of a stage's attempt; without STAGE, of the attempt that started last."""
    with explained():
        from stagecoach_cli.workspace import here

        folder = here().find(run)
        chosen = choose(folder, stage, attempt)
        path = folder.attempt(chosen.stage, chosen.number).log
        click.echo(f"{chosen.stage}, attempt {chosen.number}: {path}", err=True)
        with path.open("rb") as file:
            while True:
                ended = has_ended(folder, chosen)  # asked before the last read, so that nothing is missed
                while chunk := file.read(CHUNK_BYTES):
                    sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
                if not follow or ended:
                    return
                time.sleep(POLL_SECONDS)


def choose(folder: RunFolder, stage: str | None, number: int | None) -> AttemptRecord:
    """Return the attempt that is meant. Raises WorkspaceError, naming those there are."""
    from stagecoach_cli.workspace import WorkspaceError

    record = folder.load()
    attempts = sorted(record.attempts if record is not None else (), key=lambda item: item.started)
    chosen = [item for item in attempts if stage in (None, item.stage) and number in (None, item.number)]
    if chosen:
        return chosen[-1]
    known = ", ".join(f"{item.stage} {item.number}" for item in attempts) or "none: every stage came from the cache"
    wanted = f"attempt {number} of {stage}" if number else f"attempt of {stage}" if stage else "attempt"
    raise WorkspaceError(f"run `{folder.path.name}` has no {wanted} on this machine; there are: {known}")


def has_ended(folder: RunFolder, attempt: AttemptRecord) -> bool:
    record = folder.load()
    known = record.attempts if record is not None else ()
    ended = any(
        item.ended is not None for item in known if (item.stage, item.number) == (attempt.stage, attempt.number)
    )
    return ended or not folder.is_locked
