"""`stagecoach validate`: every problem of a run file at once."""

from __future__ import annotations

from pathlib import Path

import click

from stagecoach_cli.commands.options import explained, file_argument, set_option


@click.command("validate")
@file_argument
@set_option
def command(file: Path, overrides: tuple[str, ...]) -> None:
    """Check a run file: fields, values, graph, local inputs. All problems are told at once; exit code 2 for any."""
    with explained():
        from stagecoach_local.prepare import check

        loaded = check(file, overrides)
        stages = len(loaded.run.spec.stages)
        click.echo(f"{file}: valid; run `{loaded.run.metadata.name}`, {stages} stage{'s' * (stages != 1)}")
