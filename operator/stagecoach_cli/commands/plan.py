"""`stagecoach plan`: which stages a run would run, and estimates of their cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.look import print_look
from stagecoach_cli.commands.options import console, file_argument, report_errors, set_option, storage_option

if TYPE_CHECKING:
    from rich.console import Console

    from stagecoach_api.artifacts import Manifest
    from stagecoach_cli.estimate import Estimate
    from stagecoach_core.values import Decision, StageView
    from stagecoach_local.prepare import PreparedRun


@click.command("plan")
@file_argument
@set_option
@storage_option
def command(file: Path, overrides: tuple[str, ...], storage: str | None) -> None:
    """Show what a run would do, without starting it.

    Lists the stages in order with their dependencies, cache hits, and estimates of training tokens and time.
    """
    with report_errors():
        from stagecoach_api.problems import InvalidRun
        from stagecoach_api.store import AccessDenied, Unreachable
        from stagecoach_local.prepare import check_cache, decide_without_store, look_around, prepare
        from stagecoach_local.workspace import current_workspace

        workspace = current_workspace()
        prepared = prepare(file, workspace, overrides, storage, tolerant=True)
        look = look_around(prepared.loaded, workspace, storage, frozenset(prepared.unreachable))
        if look.problems:
            raise InvalidRun(look.problems)
        problems = [str(error) for error in prepared.unreachable.values()]
        last: dict[str, Manifest] = {}
        try:
            decision, manifests = check_cache(prepared)
            last = last_manifests(prepared, manifests)
        except (AccessDenied, Unreachable) as error:
            decision, manifests = decide_without_store(prepared), {}
            problems.append(str(error))
        print_plan(console(), prepared, decision, last, known=not problems)
        if problems:
            reason = "inputs or storage are not reachable, so cache hits cannot be determined"
            click.echo(f"{reason}: {problems[0]}", err=True)
        print_look(look)


def last_manifests(prepared: PreparedRun, found: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Return the manifest of each stage's last artifact, by stage name, whatever digest the stage had then."""
    from stagecoach_api.store import NotFound
    from stagecoach_api.stores.lookup import read_manifest
    from stagecoach_cli.artifacts.store import pointers

    last: dict[str, Manifest] = {}
    for item in pointers(prepared.store, f"{prepared.plan.namespace}/{prepared.plan.run}"):
        digest = item.pointer.stage_digest
        try:
            last[item.pointer.stage] = found.get(digest) or read_manifest(prepared.store, digest)
        except NotFound:
            continue
    return last


def print_plan(
    out: Console, prepared: PreparedRun, decision: Decision, last: Mapping[str, Manifest], known: bool
) -> None:
    """Print one row for each stage, and the total of the stages to run."""
    from stagecoach_cli.display.numbers import duration, quantity
    from stagecoach_cli.display.summary import empty_table, print_titled
    from stagecoach_cli.estimate import estimate, total
    from stagecoach_local.machine import num_ranks, this_machine

    machine = this_machine()
    table = empty_table("Stage", "Kind", "After", "Cache", ">Ranks", ">Tokens", ">Time")
    estimates: dict[str, Estimate] = {}
    for name, planned in prepared.plan.stages.items():
        view = decision.stages[name]
        item = estimate(prepared.plan, name, last.get(name), machine.cores)
        hit = view.artifact is not None
        requested = planned.stage.resources.num_nodes * planned.stage.resources.num_ranks_per_node
        if not hit:
            estimates[name] = item
        table.add_row(
            name,
            planned.stage.kind,
            ", ".join(planned.upstream),
            cache_text(view, planned.upstream, decision, known),
            ranks_text(num_ranks(planned.stage, machine, None), requested),
            "" if item.tokens is None else quantity(item.tokens),
            "" if hit else "?" if item.seconds is None else f"~{duration(item.seconds)}",
        )
    print_titled(out, f"Run {prepared.plan.run}", table)
    whole = total(estimates.values())
    time = f"~{duration(whole.seconds)}{'' if whole.complete else ' plus stages marked `?`'}"
    tokens = f"{quantity(whole.tokens)} training tokens, " if whole.tokens else ""
    count = f"{len(estimates)} of {len(prepared.plan.stages)} stages to run"
    out.print(f"{count}: {tokens}time {time}" if estimates else "all stages are finished", highlight=False)
    out.print(f"Storage: {prepared.store.uri}", highlight=False, markup=False, soft_wrap=True)


def cache_text(view: StageView, upstream: tuple[str, ...], decision: Decision, known: bool) -> str:
    """Return `hit DIGEST`, `miss DIGEST`, `unknown`, or `after STAGE` if the digest depends on an unfinished stage."""
    from stagecoach_cli.display.numbers import short

    if view.artifact is not None:
        return f"hit {short(view.digest or '')}"
    if not known:
        return "unknown"
    if view.digest is not None:
        return f"miss {short(view.digest)}"
    waited = [name for name in decision.stages if name in upstream and decision.stages[name].artifact is None]
    return f"after {waited[-1]}"


def ranks_text(local: int, requested: int) -> str:
    """Return the number of ranks on this machine, with the requested number if it differs."""
    return str(local) if local == requested else f"{local} of {requested}"
