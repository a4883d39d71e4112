"""`stagecoach render`: the run with every default filled in, and the objects the operator would create for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.options import InvalidInput, explained, file_argument, set_option, storage_option

if TYPE_CHECKING:
    from stagecoach_core.manifests.settings import BuildSettings
    from stagecoach_local.prepare import Prepared

OPERATORS_STORAGE = "<the storage of the operator's settings>"


@click.command("render")
@file_argument
@set_option
@storage_option
@click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The operator's settings file, for image, users, grace period and progress server. Default: its defaults.",
)
@click.option("--output", "-o", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
def command(
    file: Path, overrides: tuple[str, ...], storage: str | None, settings_file: Path | None, output: str
) -> None:
    """Print the run as it is understood, then what the operator would create for the first attempt of each stage.

    YAML documents or one JSON list: the TrainingRun, then a ConfigMap and a JobSet for each stage. The API server gives
    a run its UID, so the six hexadecimal digits in the names differ on a cluster. What an unfinished stage will make is
    named by words in angle brackets.
    """
    with explained():
        from stagecoach_local.prepare import prepare
        from stagecoach_local.workspace import here

        settings = read_settings(settings_file)
        prepared = prepare(file, here(), overrides, storage, tolerant=True)
        named = storage is not None or prepared.run.spec.storage.uri is not None
        click.echo(serialised(documents(prepared, settings, prepared.store.uri if named else None), output), nl=False)


def read_settings(file: Path | None) -> BuildSettings:
    """Return what a settings file says about pods; the operator's other settings in it are passed over."""
    import yaml
    from pydantic import ValidationError

    from stagecoach_api.fields import fields_of
    from stagecoach_core.manifests.settings import BuildSettings

    if file is None:
        return BuildSettings()
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise InvalidInput(f"{file}: is no mapping of settings")
        return BuildSettings.model_validate({key: given[key] for key in fields_of(BuildSettings) if key in given})
    except (yaml.YAMLError, ValidationError) as error:
        raise InvalidInput(f"{file}: {error}") from error


def documents(prepared: Prepared, settings: BuildSettings, storage_uri: str | None) -> list[dict[str, Any]]:
    """Return the run and the manifests as plain JSON values. `storage_uri` None: the operator's own storage."""
    from dataclasses import replace

    from stagecoach_api.store import AccessDenied, Unreachable
    from stagecoach_cli.rendered import cluster_plan, manifests
    from stagecoach_local.prepare import look_into_cache, without_answers

    plan = cluster_plan(prepared.run, prepared.plan, prepared.plan.code)
    prepared = replace(prepared, plan=plan)
    try:
        decision = without_answers(prepared) if storage_uri is None else look_into_cache(prepared)[0]
    except (AccessDenied, Unreachable):
        decision = without_answers(prepared)
    run = prepared.run.model_dump(mode="json", by_alias=True, exclude_none=True)
    return [run, *manifests(prepared.run, plan, decision.stages, settings, storage_uri or OPERATORS_STORAGE)]


def serialised(items: list[dict[str, Any]], output: str) -> str:
    if output == "json":
        import json

        return json.dumps(items, indent=2, ensure_ascii=False) + "\n"
    from stagecoach_cli.rendered import as_yaml

    return as_yaml(items)
