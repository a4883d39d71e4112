"""The ConfigMap of an attempt: what its trainer is told."""

from __future__ import annotations

from typing import Any

from stagecoach_api.names import CA_FILE, STAGE_FILE
from stagecoach_core.manifests.labels import metadata
from stagecoach_core.manifests.settings import BuildSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt


def config_map(attempt: StageAttempt, settings: BuildSettings) -> dict[str, Any]:
    """Return the ConfigMap. It cannot be changed: every pod of an attempt is told the same, whenever it starts."""
    data = {STAGE_FILE: attempt.resolved.model_dump_json(indent=1)}
    if settings.progress_url is not None and settings.progress_ca is not None:
        data[CA_FILE] = settings.progress_ca
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(attempt), "immutable": True, "data": data}
