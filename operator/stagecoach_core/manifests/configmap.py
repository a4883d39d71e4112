"""The ConfigMap of an attempt, with its `stage.json`."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from stagecoach_api.names import CA_FILE, STAGE_FILE
from stagecoach_core.manifests.labels import metadata
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt

DIGEST_CHARACTERS = 8


def config_map(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, Any]:
    """Return the ConfigMap. It is immutable: all pods of an attempt read the same content, whenever they start."""
    own = {**metadata(attempt), "name": config_map_name(attempt, settings)}
    data = _data(attempt, settings)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": own, "immutable": True, "data": data}


def config_map_name(attempt: StageAttempt, settings: ManifestSettings) -> str:
    """Return the ConfigMap's name, which contains a digest of its content.

    Other content has another name, so the operator never changes or deletes a ConfigMap, and needs no right to do so:
    RBAC cannot limit that right to the operator's own.
    """
    content = json.dumps(_data(attempt, settings), sort_keys=True).encode()
    return f"{attempt.name}-{hashlib.sha256(content).hexdigest()[:DIGEST_CHARACTERS]}"


def _data(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, str]:
    data = {STAGE_FILE: attempt.resolved.model_dump_json(indent=1)}
    if settings.progress_url is not None and settings.progress_ca is not None:
        data[CA_FILE] = settings.progress_ca
    return data
