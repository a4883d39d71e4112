"""Commands that messages advise, with the options that the run had."""

from __future__ import annotations

import shlex
from pathlib import Path

from stagecoach_local.workspace import Invocation


def run_command(file: Path, invocation: Invocation) -> str:
    """Return the `stagecoach run` command that continues a run; a file below the working directory is relative."""
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    words = ["stagecoach", "run", str(shown)]
    for override in invocation.overrides:
        words += ["--set", override]
    for option, value in (
        ("--storage", invocation.storage),
        ("--until", invocation.until),
        ("--nproc", invocation.nproc),
    ):
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)
