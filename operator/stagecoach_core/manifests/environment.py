"""Environment of the trainer's container: places, ranks, fabric, progress. Never a secret."""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_core.manifests.naming import pod_host
from stagecoach_core.manifests.settings import BuildSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt


def environment(attempt: StageAttempt, settings: BuildSettings) -> list[dict[str, Any]]:
    """Return the variables in a fixed order: the same attempt gives the same manifest."""
    plain = {
        **_places(attempt),
        names.ENV_THREADS: str(attempt.num_threads),
        **_rendezvous(attempt),
        **_fabric(attempt),
        **_progress(attempt, settings),
    }
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{names.COMPLETION_INDEX}']"}}
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        {"name": names.ENV_NODE_RANK, "valueFrom": index},
    ]


def _places(attempt: StageAttempt) -> dict[str, str]:
    found = {
        names.ENV_STAGE_FILE: f"{names.STAGE_MOUNT}/{names.STAGE_FILE}",
        names.ENV_WORK_DIR: names.WORK_FOLDER,
        names.ENV_CACHE_DIR: names.CACHE_FOLDER,
        names.ENV_RESULT_FILE: names.TERMINATION_LOG,
        names.ENV_PROGRESS_FILE: f"{names.WORK_FOLDER}/{names.PROGRESS_FILE}",
        "HOME": names.DATA_MOUNT,  # libraries keep caches there, and the image's own is read-only
        "USER": names.MANAGED_BY,  # libraries ask for a name, and the image need not know the number
    }
    if attempt.credentials is not None:
        found[names.ENV_CREDENTIALS_DIR] = names.CREDENTIALS_MOUNT
    if attempt.endpoint_secrets:
        found[names.ENV_ENDPOINT_KEYS] = names.ENDPOINT_KEYS_MOUNT
    return found


def _rendezvous(attempt: StageAttempt) -> dict[str, str]:
    """Ranks meet at pod 0. Each pod's rank is its index: sorted by name, `-10` would come before `-2`."""
    return {
        names.ENV_NUM_NODES: str(attempt.resolved.num_nodes),
        names.ENV_RANKS_PER_NODE: str(attempt.resolved.ranks_per_node),
        names.ENV_MASTER_ADDRESS: pod_host(attempt.name, 0),
        names.ENV_MASTER_PORT: str(names.MASTER_PORT),
    }


def _fabric(attempt: StageAttempt) -> dict[str, str]:
    """Settings of the libraries that ranks talk through. NCCL is silent by default even about a broken link."""
    defaults = {"NCCL_DEBUG": "WARN"} if attempt.stage.resources.gpus_per_node else {}
    return defaults | {item.name: item.value for item in attempt.stage.pods.fabric or ()}


def _progress(attempt: StageAttempt, settings: BuildSettings) -> dict[str, str]:
    """Where and as whom the attempt reports."""
    if settings.progress_url is None:
        return {}
    url = settings.progress_url.rstrip("/") + names.progress_path(attempt.resolved.namespace, attempt.name)
    found = {names.ENV_PROGRESS_URL: url, names.ENV_PROGRESS_TOKEN: f"{names.TOKEN_MOUNT}/{names.TOKEN_FILE}"}
    if settings.progress_ca is not None:
        found[names.ENV_PROGRESS_CA] = f"{names.STAGE_MOUNT}/{names.CA_FILE}"
    return found
