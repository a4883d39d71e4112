"""`stagecoach version`."""

from __future__ import annotations

import click

from stagecoach_api.version import __version__


@click.command("version")
def command() -> None:
    """Print the version."""
    click.echo(f"stagecoach {__version__}")
