"""`stagecoach plan`: which stages a run would run, and estimates of their cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.look import print_look
from stagecoach_cli.commands.options import (
    console,
    file_argument,
    output_option,
    report_errors,
    set_option,
    storage_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from stagecoach_api.artifacts import Manifest
    from stagecoach_cli.estimate.cost import Estimate
    from stagecoach_cli.estimate.model_files import ModelFiles
    from stagecoach_core.values import Decision, StageView
    from stagecoach_local.prepare import PreparedRun

WIDE_COLUMNS = 120
"""Terminals with fewer columns show fewer of them."""


@click.command("plan")
@file_argument
@set_option
@storage_option
@output_option
def command(file: Path, overrides: tuple[str, ...], storage: str | None, output: str) -> None:
    """Show what a run would do, without starting it.

    Lists the stages in order with their cache hits, and estimates of training tokens, time, GPU-hours and memory: from
    the last run, else from the FLOPs of the model on the GPUs that the stage requests, or on this machine's cores.
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
        lines = plan_lines(prepared, decision, last, known=not problems)
        if output == "json":
            click.echo(json.dumps(plan_json(prepared, lines), indent=2, ensure_ascii=False))
        else:
            print_plan(console(), prepared, lines)
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


@dataclass(frozen=True)
class PlanLine:
    """A stage of the plan."""

    name: str
    kind: str
    after: tuple[str, ...]
    digest: str | None
    """None if it depends on unfinished stages."""
    hit: bool
    cache: str
    """What is known of the cache: hit, miss, or what it depends on."""
    ranks: str
    cost: Estimate
    lacks: str | None
    """Message about GPUs that this machine lacks; None if it lacks none."""


def plan_lines(prepared: PreparedRun, decision: Decision, last: Mapping[str, Manifest], known: bool) -> list[PlanLine]:
    """Return the stages of a plan. `known`: whether the store could be asked for cache hits."""
    from stagecoach_cli.estimate.cost import estimate
    from stagecoach_local.machine import missing_gpus, num_ranks, this_machine

    machine, library = this_machine(), model_files(prepared)
    lines = []
    for name, planned in prepared.plan.stages.items():
        view = decision.stages[name]
        requested = planned.stage.resources.num_nodes * planned.stage.resources.num_ranks_per_node
        lines.append(
            PlanLine(
                name=name,
                kind=planned.stage.kind,
                after=planned.upstream,
                digest=view.digest,
                hit=view.artifact is not None,
                cache=cache_text(view, planned.upstream, decision, known),
                ranks=ranks_text(num_ranks(planned.stage, machine, None), requested),
                cost=estimate(prepared.plan, name, last.get(name), machine, library),
                lacks=missing_gpus(planned.stage, machine),
            )
        )
    return lines


def model_files(prepared: PreparedRun) -> ModelFiles:
    """Return what looks up the models of a run, except at inputs that were not reached before."""
    from stagecoach_cli.estimate.model_files import ModelFiles

    storage = prepared.run.spec.storage
    unreachable = {
        planned.externals[key].uri: error
        for planned in prepared.plan.stages.values()
        for key, error in prepared.unreachable.items()
        if key in planned.externals
    }
    return ModelFiles(storage.endpoint, storage.region, unreachable)


def print_plan(out: Console, prepared: PreparedRun, lines: list[PlanLine]) -> None:
    """Print one row for each stage, the total of the stages to run, and what is unknown or does not fit."""
    from stagecoach_cli.display.numbers import duration, quantity
    from stagecoach_cli.display.summary import empty_table, print_titled

    wide = out.width >= WIDE_COLUMNS
    with_gpus = any(line.cost.hardware.num_gpus for line in lines)
    columns = ["Stage", *(["Kind", "After"] if wide else []), "Cache", *(["Ranks here"] if wide else []), "Hardware"]
    columns += [">Tokens", ">Time", *([">GPU-h", ">GPU memory"] if with_gpus else [])]
    table = empty_table(*columns)
    for line in lines:
        cost = line.cost
        seconds = None if cost.seconds is None else f"~{duration(cost.seconds)}"
        cells = [line.name, *([line.kind, ", ".join(line.after)] if wide else [])]
        cells += [
            line.cache if wide or not line.digest else line.cache.split(" ")[0],
            *([line.ranks] if wide else []),
            str(cost.hardware),
        ]
        cells += ["" if cost.tokens is None else quantity(cost.tokens), "" if line.hit else seconds or "?"]
        cells += [gpu_hours_text(line), memory_text(cost)] if with_gpus else []
        table.add_row(*cells)
    print_titled(out, f"Run {prepared.plan.run}", table)
    for text in [total_text(lines), *notes(lines), store_text(prepared.store.uri, lines)]:
        out.print(text, highlight=False, markup=False, soft_wrap=True)


def gpu_hours_text(line: PlanLine) -> str:
    from stagecoach_cli.display.numbers import quantity

    hours = line.cost.gpu_hours
    if line.hit or not line.cost.hardware.num_gpus:
        return ""
    return "?" if hours is None else f"~{quantity(round(hours, 2))}"


def memory_text(cost: Estimate) -> str:
    """Return the memory that is needed of a GPU's, such as `62/80 GB`."""
    if cost.memory is None or cost.hardware.gpu_bytes is None:
        return ""
    return f"{cost.memory.total / 1e9:.3g}/{cost.hardware.gpu_bytes / 1e9:.0f} GB"


def total_text(lines: list[PlanLine]) -> str:
    """Return the sum over the stages to run; stages of unknown time are left out, and that is stated."""
    from stagecoach_cli.display.numbers import duration, quantity
    from stagecoach_cli.estimate.cost import total

    to_run = [line.cost for line in lines if not line.hit]
    if not to_run:
        return "all stages are finished"
    whole = total(to_run)
    time = f"time ~{duration(whole.seconds)}"
    if not whole.complete:
        unknown = sum(item.seconds is None for item in to_run)
        more = f"{unknown} stage{'s' * (unknown != 1)} of unknown time"
        time = f"time at least ~{duration(whole.seconds)}, with {more}" if whole.seconds else "time unknown"
    parts = [f"{quantity(whole.tokens)} training tokens"] if whole.tokens else []
    parts += [time, *([f"~{quantity(round(whole.gpu_hours, 2))} GPU-hours"] if whole.gpu_hours else [])]
    return f"{len(to_run)} of {len(lines)} stages to run: {', '.join(parts)}"


def notes(lines: list[PlanLine]) -> list[str]:
    """Return why times are unknown, which GPU is assumed, and what does not fit into memory."""
    to_run = [line for line in lines if not line.hit]
    by_reason: dict[str, list[str]] = {}
    for line in to_run:
        if line.cost.unknown:
            by_reason.setdefault(line.cost.unknown, []).append(line.name)
    found = [f"time of {', '.join(names)} unknown: {reason}" for reason, names in by_reason.items()]
    lacking = sum(line.lacks is not None for line in to_run)
    if lacking:
        stages = f"{lacking} stage{'s request' if lacking != 1 else ' requests'}"
        found.append(f"{stages} GPUs that this machine lacks: `stagecoach run` would use what it has")
    if any(line.cost.hardware.assumed for line in to_run):
        found.append("?: the run names no GPU (`resources.gpuProduct`); an A100 with 80 GB is assumed")
    found += [
        f"{line.name} may not fit: it needs about {memory_text(line.cost)}; lower `batch.microBatchRows`, set "
        "`gradientCheckpointing`, or raise `sharding.zero`"
        for line in to_run
        if not line.cost.fits
    ]
    return found


def store_text(uri: str, lines: list[PlanLine]) -> str:
    """Return the store, and how many stages it has: another folder's store may have them all."""
    hits = sum(line.hit for line in lines)
    text = f"Storage: {uri} ({hits} of {len(lines)} stages found here)"
    if hits or not uri.startswith("file:"):
        return text
    return f"{text}\n  Artifacts of runs started in another folder are in its .stagecoach/store; see --storage."


def plan_json(prepared: PreparedRun, lines: list[PlanLine]) -> dict[str, Any]:
    """Return the plan as JSON values. Times are in seconds, memory is in bytes; what is unknown is null."""
    return {
        "run": prepared.plan.run,
        "namespace": prepared.plan.namespace,
        "storage": prepared.store.uri,
        "stages": [
            {
                "name": line.name,
                "kind": line.kind,
                "after": list(line.after),
                "digest": line.digest,
                "cached": line.hit,
                "hardware": str(line.cost.hardware),
                "gpus": line.cost.hardware.num_gpus,
                "tokens": line.cost.tokens,
                "seconds": 0.0 if line.hit else line.cost.seconds,
                "gpuHours": 0.0 if line.hit else line.cost.gpu_hours,
                "bytesPerGpu": None if line.cost.memory is None else line.cost.memory.total,
                "unknown": line.cost.unknown or None,
            }
            for line in lines
        ],
    }


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
