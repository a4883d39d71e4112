"""`stagecoach validate`: report all problems of a run file, and of what it uses on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.look import print_look
from stagecoach_cli.commands.options import (
    file_argument,
    output_option,
    report_errors,
    set_option,
    storage_option,
)
from stagecoach_cli.exit_codes import EXIT_INVALID

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stagecoach_api.problems import Problem
    from stagecoach_api.reading.loading import LoadedRun
    from stagecoach_local.look import Look


@click.command("validate")
@file_argument
@set_option
@storage_option
@output_option
def command(file: Path, overrides: tuple[str, ...], storage: str | None, output: str) -> int:
    """Check a run file, and what it uses on this machine.

    Checks fields, values, the graph, the first records of local data, local models and the storage. All problems are
    reported, with exit code 2. Remote inputs are not looked into.
    """
    with report_errors():
        from stagecoach_api.problems import InvalidRun
        from stagecoach_local.look import Look
        from stagecoach_local.prepare import check_on_this_machine
        from stagecoach_local.workspace import current_workspace

        loaded = None
        try:
            loaded, look = check_on_this_machine(file, current_workspace(), overrides, storage)
        except InvalidRun as error:
            look = Look(problems=error.problems)
        if output == "json":
            print_json(file, loaded, look)
            return EXIT_INVALID if look.problems else 0
        print_look(look)
        if loaded is None or look.problems:
            raise InvalidRun(look.problems)
        name, count = loaded.run.metadata.name, len(loaded.run.spec.stages)
        click.echo(f"{file}: valid; run `{name}`, {count} stage{'s' * (count != 1)}")
        return 0


def print_json(file: Path, loaded: LoadedRun | None, look: Look) -> None:
    """Print the result as one JSON object. `loaded`: None if the file itself is not valid."""
    import json

    result = {
        "file": str(file),
        "valid": not look.problems,
        "run": None if loaded is None else loaded.run.metadata.name,
        "stages": [] if loaded is None else [stage.name for stage in loaded.run.spec.stages],
        "problems": as_json(look.problems),
        "warnings": as_json(look.warnings),
        "notLookedInto": list(look.unseen),
    }
    click.echo(json.dumps(result, indent=2, ensure_ascii=False, default=str))


def as_json(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Return problems as JSON values; a field that is absent has no `value`."""
    from stagecoach_api.problems import MISSING

    return [
        {
            "path": problem.path,
            "line": problem.line,
            "source": problem.source,
            **({} if problem.value is MISSING else {"value": problem.value}),
            "rule": problem.rule,
            "remedy": problem.remedy,
        }
        for problem in problems
    ]
