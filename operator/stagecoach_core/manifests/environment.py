"""Environment variables of the trainer's container: paths, ranks, fabric, progress. Never a secret."""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_core.manifests.naming import pod_host
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt


def environment(attempt: StageAttempt, settings: ManifestSettings) -> list[dict[str, Any]]:
    """Return the variables in a fixed order: the same attempt gives the same manifest."""
    plain = {
        **_paths(attempt),
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


def _paths(attempt: StageAttempt) -> dict[str, str]:
    paths = {
        names.ENV_STAGE_FILE: f"{names.STAGE_MOUNT}/{names.STAGE_FILE}",
        names.ENV_WORK_DIR: names.WORK_FOLDER,
        names.ENV_CACHE_DIR: names.CACHE_FOLDER,
        names.ENV_RESULT_FILE: names.TERMINATION_LOG,
        names.ENV_PROGRESS_FILE: f"{names.WORK_FOLDER}/{names.PROGRESS_FILE}",
        "HOME": names.DATA_MOUNT,  # libraries write caches there, and the image's own home is read-only
        "USER": names.MANAGED_BY,  # libraries look up the user's name, and the image has none for a numeric user
    }
    if attempt.credentials is not None:
        paths[names.ENV_CREDENTIALS_DIR] = names.CREDENTIALS_MOUNT
    if attempt.endpoint_secrets:
        paths[names.ENV_ENDPOINT_KEYS] = names.ENDPOINT_KEYS_MOUNT
    return paths


def _rendezvous(attempt: StageAttempt) -> dict[str, str]:
    """Return the variables of the rendezvous at pod 0. A pod's node rank is its index (see `environment`), not its
    position among the sorted names, in which `-10` comes before `-2`."""
    return {
        names.ENV_NUM_NODES: str(attempt.resolved.num_nodes),
        names.ENV_RANKS_PER_NODE: str(attempt.resolved.ranks_per_node),
        names.ENV_MASTER_ADDRESS: pod_host(attempt.name, 0),
        names.ENV_MASTER_PORT: str(names.MASTER_PORT),
    }


def _fabric(attempt: StageAttempt) -> dict[str, str]:
    """Return the settings of the communication libraries. By default NCCL does not even report a broken link."""
    defaults = {"NCCL_DEBUG": "WARN"} if attempt.stage.resources.gpus_per_node else {}
    return defaults | {item.name: item.value for item in attempt.stage.pods.fabric or ()}


def _progress(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, str]:
    """Return where the attempt reports its progress, and with which token."""
    if settings.progress_url is None:
        return {}
    url = settings.progress_url.rstrip("/") + names.progress_path(attempt.resolved.namespace, attempt.name)
    variables = {names.ENV_PROGRESS_URL: url, names.ENV_PROGRESS_TOKEN: f"{names.TOKEN_MOUNT}/{names.TOKEN_FILE}"}
    if settings.progress_ca is not None:
        variables[names.ENV_PROGRESS_CA] = f"{names.STAGE_MOUNT}/{names.CA_FILE}"
    return variables
