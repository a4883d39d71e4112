"""`stagecoach render`: the run with all defaults, and the Kubernetes objects the operator would create for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.options import InvalidInput, file_argument, report_errors, set_option, storage_option

if TYPE_CHECKING:
    from stagecoach_core.manifests.settings import ManifestSettings
    from stagecoach_local.prepare import PreparedRun

OPERATOR_STORAGE = "<the storage of the operator's settings>"


@click.command("render")
@file_argument
@set_option
@storage_option
@click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The operator's settings file, for image, users, grace period and progress server. Default: built-in values.",
)
@click.option("--output", "-o", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True, help="Format.")
def command(
    file: Path, overrides: tuple[str, ...], storage: str | None, settings_file: Path | None, output: str
) -> None:
    """Print the objects the operator would create for a run.

    The output is YAML documents or one JSON list: the TrainingRun with all defaults, then a ConfigMap and a JobSet for
    each stage's first attempt. The names contain six hexadecimal digits that depend on the run's UID and differ on a
    cluster. Values that depend on unfinished stages are shown as placeholders in angle brackets.
    """
    with report_errors():
        from stagecoach_local.prepare import prepare
        from stagecoach_local.workspace import current_workspace

        settings = read_settings(settings_file)
        prepared = prepare(file, current_workspace(), overrides, storage, tolerant=True)
        is_set = storage is not None or prepared.run.spec.storage.uri is not None
        click.echo(serialised(documents(prepared, settings, prepared.store.uri if is_set else None), output), nl=False)


def read_settings(file: Path | None) -> ManifestSettings:
    """Return the settings of pods from the operator's settings file; its other settings are ignored."""
    import yaml
    from pydantic import ValidationError

    from stagecoach_api.fields import fields_of
    from stagecoach_core.manifests.settings import ManifestSettings

    if file is None:
        return ManifestSettings()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise InvalidInput(f"{file}: must be a mapping of settings (got {type(content).__name__})")
        return ManifestSettings.model_validate(
            {key: content[key] for key in fields_of(ManifestSettings) if key in content}
        )
    except (yaml.YAMLError, ValidationError) as error:
        raise InvalidInput(f"{file}: {error}") from error


def documents(prepared: PreparedRun, settings: ManifestSettings, storage_uri: str | None) -> list[dict[str, Any]]:
    """Return the run and the manifests as JSON values. `storage_uri`: None for the operator's default storage."""
    from dataclasses import replace

    from stagecoach_api.store import AccessDenied, Unreachable
    from stagecoach_cli.rendered import cluster_plan, manifests
    from stagecoach_local.prepare import check_cache, decide_without_store

    plan = cluster_plan(prepared.run, prepared.plan, prepared.plan.code)
    prepared = replace(prepared, plan=plan)
    try:
        decision = decide_without_store(prepared) if storage_uri is None else check_cache(prepared)[0]
    except (AccessDenied, Unreachable):
        decision = decide_without_store(prepared)
    run = prepared.run.model_dump(mode="json", by_alias=True, exclude_none=True)
    return [run, *manifests(prepared.run, plan, decision.stages, settings, storage_uri or OPERATOR_STORAGE)]


def serialised(items: list[dict[str, Any]], output: str) -> str:
    if output == "json":
        import json

        return json.dumps(items, indent=2, ensure_ascii=False) + "\n"
    from stagecoach_cli.rendered import as_yaml

    return as_yaml(items)
