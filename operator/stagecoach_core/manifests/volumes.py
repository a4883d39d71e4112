"""Volumes and mounts of the trainer's container. Its root file system is read-only, so it can write to these only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stagecoach_api import names
from stagecoach_api.pods import Volume
from stagecoach_core.manifests.configmap import config_map_name
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt

DEFAULT_SHARED_MEMORY = "64Mi"
SECRET_MODE = 0o440
"""Readable by the container's user, through the pod's group, and by no other user."""

USER_PREFIX = "volume-"
"""Prefix of the names of a run's own volumes, so that they cannot clash with ours."""


@dataclass(frozen=True)
class Mount:
    """A volume and where it is mounted in the container."""

    name: str
    path: str
    source: dict[str, Any]
    read_only: bool = False
    sub_path: str | None = None

    def as_volume(self) -> dict[str, Any]:
        return {"name": self.name, **self.source}

    def as_mount(self) -> dict[str, Any]:
        mount: dict[str, Any] = {"name": self.name, "mountPath": self.path}
        if self.read_only:
            mount["readOnly"] = True
        if self.sub_path is not None:
            mount["subPath"] = self.sub_path
        return mount


def volumes(attempt: StageAttempt, settings: ManifestSettings) -> list[dict[str, Any]]:
    """Return the pod's volumes."""
    return [mount.as_volume() for mount in mounts(attempt, settings)]


def volume_mounts(attempt: StageAttempt, settings: ManifestSettings) -> list[dict[str, Any]]:
    """Return the container's volume mounts."""
    return [mount.as_mount() for mount in mounts(attempt, settings)]


def mounts(attempt: StageAttempt, settings: ManifestSettings) -> list[Mount]:
    """Return all mounts of an attempt."""
    limit = {} if settings.work_size_limit is None else {"sizeLimit": settings.work_size_limit}
    shared = {"medium": "Memory", "sizeLimit": attempt.stage.resources.shared_memory or DEFAULT_SHARED_MEMORY}
    all_mounts = [
        Mount("stage", names.STAGE_MOUNT, {"configMap": {"name": config_map_name(attempt, settings)}}, read_only=True),
        # One volume for work and cache: files are moved between them, and rename does not cross volumes.
        Mount("data", names.DATA_MOUNT, {"emptyDir": limit}),
        Mount("tmp", names.TEMPORARY_MOUNT, {"emptyDir": {}}),
        # NCCL and data loaders use it; the container runtime's default is 64 MiB.
        Mount("shared-memory", names.SHARED_MEMORY_MOUNT, {"emptyDir": shared}),
    ]
    if attempt.credentials is not None:
        all_mounts.append(_credentials(attempt.credentials))
    all_mounts += [_endpoint_key(index, secret) for index, secret in enumerate(attempt.endpoint_secrets)]
    if settings.progress_url is not None:
        all_mounts.append(_token(attempt, settings.progress_token_seconds))
    return all_mounts + [_own(volume) for volume in attempt.stage.pods.volumes or ()]


def _credentials(secret: str) -> Mount:
    """Return the mount of the S3 credentials. Without the Secret the pod does not start; the kubelet reports it."""
    items = [{"key": key, "path": key} for key in (names.ACCESS_KEY_FILE, names.SECRET_KEY_FILE)]
    source = {"secret": {"secretName": secret, "defaultMode": SECRET_MODE, "items": items}}
    return Mount("credentials", names.CREDENTIALS_MOUNT, source, read_only=True)


def _endpoint_key(index: int, secret: str) -> Mount:
    """Return the mount of an endpoint's API key.

    The volume's name has a number instead of the Secret's name, which may be too long for a prefix.
    """
    items = [{"key": names.ENDPOINT_KEY_FILE, "path": names.ENDPOINT_KEY_FILE}]
    source = {"secret": {"secretName": secret, "defaultMode": SECRET_MODE, "items": items}}
    return Mount(f"endpoint-key-{index}", f"{names.ENDPOINT_KEYS_MOUNT}/{secret}", source, read_only=True)


def _token(attempt: StageAttempt, seconds: int) -> Mount:
    """Return the mount of a token that is valid only for reporting the progress of this attempt."""
    audience = names.progress_audience(attempt.resolved.namespace, attempt.name)
    token = {"audience": audience, "expirationSeconds": seconds, "path": names.TOKEN_FILE}
    source = {"projected": {"defaultMode": SECRET_MODE, "sources": [{"serviceAccountToken": token}]}}
    return Mount("progress-token", names.TOKEN_MOUNT, source, read_only=True)


def _own(volume: Volume) -> Mount:
    """Return the mount of a volume that the run specifies."""
    source: dict[str, Any]
    if volume.claim_name is not None:
        source = {"persistentVolumeClaim": {"claimName": volume.claim_name, "readOnly": volume.read_only}}
    elif volume.config_map_name is not None:
        source = {"configMap": {"name": volume.config_map_name}}
    else:
        source = {"secret": {"secretName": volume.secret_name, "defaultMode": SECRET_MODE}}
    return Mount(USER_PREFIX + volume.name, volume.mount_path, source, volume.read_only, volume.sub_path)
