"""`stagecoach render`: the run with every default filled in, and what each stage would be told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.options import explained, file_argument, set_option, storage_option

if TYPE_CHECKING:
    from stagecoach_cli.prepare import Prepared
    from stagecoach_core.values import Decision


@click.command("render")
@file_argument
@set_option
@storage_option
@click.option("--output", "-o", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
def command(file: Path, overrides: tuple[str, ...], storage: str | None, output: str) -> None:
    """Print the run as it is understood, then each stage's document.

    YAML documents or one JSON list. A stage whose inputs are not finished has no digest yet, and its inputs name the
    stages.
    """
    with explained():
        from stagecoach_api.store import AccessDenied, Unreachable
        from stagecoach_cli.prepare import look_into_cache, prepare, without_answers
        from stagecoach_cli.workspace import here

        prepared = prepare(file, here(), overrides, storage, tolerant=True)
        try:
            decision, _ = look_into_cache(prepared)
        except (AccessDenied, Unreachable):
            decision = without_answers(prepared)
        click.echo(serialised(documents(prepared, decision), output), nl=False)


def documents(prepared: Prepared, decision: Decision) -> list[dict[str, Any]]:
    """Return the run and the stages, in topological order, as plain JSON values."""
    run = prepared.run.model_dump(mode="json", by_alias=True, exclude_none=True)
    return [run, *(stage_document(prepared, decision, name) for name in prepared.plan.stages)]


def stage_document(prepared: Prepared, decision: Decision, name: str) -> dict[str, Any]:
    """Return what the first attempt of a stage would be told; inputs that are not finished are left open."""
    from stagecoach_core.resolve import artifacts_of, resolved_inputs

    planned = prepared.plan.stages[name]
    stage = planned.stage
    finished = artifacts_of(decision.stages)
    reads = {reference.stage for _, reference in stage.references() if reference.stage is not None}
    inputs: dict[str, Any] = {f"stage:{item}": {"stage": item} for item in sorted(reads)}
    if reads <= finished.keys():
        found = resolved_inputs(planned, finished)
        inputs = {key: item.model_dump(mode="json", by_alias=True) for key, item in found.items()}
    return {
        "stage": name,
        "kind": stage.kind,
        "digest": decision.stages[name].digest,
        "finished": decision.stages[name].artifact is not None,
        "after": list(planned.upstream),
        "seed": stage.seed,
        "code": prepared.plan.code,
        "inputs": inputs,
        "resources": stage.resources.model_dump(mode="json", by_alias=True, exclude_none=True),
        "retries": stage.retries.model_dump(mode="json", by_alias=True),
        "config": stage.config.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def serialised(items: list[dict[str, Any]], output: str) -> str:
    if output == "json":
        import json

        return json.dumps(items, indent=2, ensure_ascii=False) + "\n"
    import yaml

    return yaml.safe_dump_all(items, allow_unicode=True, sort_keys=False, explicit_start=True)
