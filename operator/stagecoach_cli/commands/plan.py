"""`stagecoach plan`: what a run would do, and what it would take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import console, explained, file_argument, set_option, storage_option

if TYPE_CHECKING:
    from rich.console import Console

    from stagecoach_api.artifacts import Manifest
    from stagecoach_cli.estimate import Estimate
    from stagecoach_core.values import Decision, StageView
    from stagecoach_local.prepare import Prepared


@click.command("plan")
@file_argument
@set_option
@storage_option
def command(file: Path, overrides: tuple[str, ...], storage: str | None) -> None:
    """Show a run's stages in order: what each waits for, whether its work is done, tokens and time it may take."""
    with explained():
        from stagecoach_api.store import AccessDenied, Unreachable
        from stagecoach_local.prepare import look_into_cache, prepare, without_answers
        from stagecoach_local.workspace import here

        prepared = prepare(file, here(), overrides, storage, tolerant=True)
        trouble = [str(error) for error in prepared.unreachable.values()]
        last: dict[str, Manifest] = {}
        try:
            decision, manifests = look_into_cache(prepared)
            last = last_manifests(prepared, manifests)
        except (AccessDenied, Unreachable) as error:
            decision, manifests = without_answers(prepared), {}
            trouble.append(str(error))
        print_plan(console(), prepared, decision, last, known=not trouble)
        if trouble:
            click.echo(f"inputs or storage not reachable, so the cache is not known: {trouble[0]}", err=True)


def last_manifests(prepared: Prepared, found: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Return the manifest each stage made last, by its name: of this digest, or of an earlier one it had."""
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


def print_plan(out: Console, prepared: Prepared, decision: Decision, last: Mapping[str, Manifest], known: bool) -> None:
    """Print one row for each stage, and the sum of what is still to be done."""
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
        wanted = planned.stage.resources.num_nodes * planned.stage.resources.num_ranks_per_node
        if not hit:
            estimates[name] = item
        table.add_row(
            name,
            planned.stage.kind,
            ", ".join(planned.upstream),
            cache_word(view, planned.upstream, decision, known),
            ranks_word(num_ranks(planned.stage, machine, None), wanted),
            "" if item.tokens is None else quantity(item.tokens),
            "" if hit else "?" if item.seconds is None else f"~{duration(item.seconds)}",
        )
    print_titled(out, f"Run {prepared.plan.run}", table)
    whole = total(estimates.values())
    time = f"~{duration(whole.seconds)}{'' if whole.complete else ' and that of stages with `?`'}"
    tokens = f"{quantity(whole.tokens)} training tokens, " if whole.tokens else ""
    doing = f"{len(estimates)} of {len(prepared.plan.stages)} stages to run"
    out.print(f"{doing}: {tokens}time {time}" if estimates else "every stage is finished", highlight=False)
    out.print(f"Storage: {prepared.store.uri}", highlight=False, markup=False, soft_wrap=True)


def cache_word(view: StageView, upstream: tuple[str, ...], decision: Decision, known: bool) -> str:
    """Return `hit DIGEST`, `miss DIGEST`, or what decides it: `after` the last stage it waits for, or `unknown`."""
    from stagecoach_cli.display.numbers import short

    if view.artifact is not None:
        return f"hit {short(view.digest or '')}"
    if not known:
        return "unknown"
    if view.digest is not None:
        return f"miss {short(view.digest)}"
    waited = [name for name in decision.stages if name in upstream and decision.stages[name].artifact is None]
    return f"after {waited[-1]}"


def ranks_word(here: int, wanted: int) -> str:
    """Return the ranks a stage has on this machine, beside those its resources ask for where they differ."""
    return str(here) if here == wanted else f"{here} of {wanted}"
