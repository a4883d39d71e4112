"""What a look at a run's inputs and storage found, besides problems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagecoach_cli.commands.options import notify

if TYPE_CHECKING:
    from stagecoach_local.look import Look


MAX_LISTED = 3


def print_look(look: Look) -> None:
    """Print warnings, and what was not looked into, to stderr."""
    for warning in look.warnings:
        notify(f"warning: {warning}")
    for text in look.unseen[:MAX_LISTED]:
        notify(f"not looked into: {text}")
    if len(look.unseen) > MAX_LISTED:
        notify(f"not looked into: and {len(look.unseen) - MAX_LISTED} more")
