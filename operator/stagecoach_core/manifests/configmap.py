"""The ConfigMap of an attempt, with its `stage.json`."""

from __future__ import annotations

from typing import Any

from stagecoach_api.names import CA_FILE, STAGE_FILE
from stagecoach_core.manifests.labels import metadata
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt


def config_map(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, Any]:
    """Return the ConfigMap. It is immutable: all pods of an attempt read the same content, whenever they start."""
    data = {STAGE_FILE: attempt.resolved.model_dump_json(indent=1)}
    if settings.progress_url is not None and settings.progress_ca is not None:
        data[CA_FILE] = settings.progress_ca
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(attempt), "immutable": True, "data": data}
