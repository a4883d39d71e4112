"""`stagecoach validate`: report all problems of a run file."""

from __future__ import annotations

from pathlib import Path

import click

from stagecoach_cli.commands.options import file_argument, report_errors, set_option


@click.command("validate")
@file_argument
@set_option
def command(file: Path, overrides: tuple[str, ...]) -> None:
    """Check a run file: fields, values, graph and local inputs. All problems are reported, with exit code 2."""
    with report_errors():
        from stagecoach_local.prepare import check

        loaded = check(file, overrides)
        stages = len(loaded.run.spec.stages)
        click.echo(f"{file}: valid; run `{loaded.run.metadata.name}`, {stages} stage{'s' * (stages != 1)}")
