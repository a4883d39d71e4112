"""What is mounted into the trainer's container: the root file system is read-only, so every place to write is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stagecoach_api import names
from stagecoach_api.pods import Volume
from stagecoach_core.manifests.settings import BuildSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt

DEFAULT_SHARED_MEMORY = "64Mi"
SECRET_MODE = 0o440
"""Readable for the container's user, through the pod's group, and for nobody else."""

USER_PREFIX = "volume-"
"""In front of the names of a run's own volumes, so that none of them is one of ours."""


@dataclass(frozen=True)
class Mount:
    """A volume and its place in the container."""

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


def volumes(attempt: StageAttempt, settings: BuildSettings) -> list[dict[str, Any]]:
    """Return the pod's volumes."""
    return [mount.as_volume() for mount in mounts(attempt, settings)]


def volume_mounts(attempt: StageAttempt, settings: BuildSettings) -> list[dict[str, Any]]:
    """Return where the container has them."""
    return [mount.as_mount() for mount in mounts(attempt, settings)]


def mounts(attempt: StageAttempt, settings: BuildSettings) -> list[Mount]:
    """Return everything that is mounted."""
    limit = {} if settings.work_size_limit is None else {"sizeLimit": settings.work_size_limit}
    shared = {"medium": "Memory", "sizeLimit": attempt.stage.resources.shared_memory or DEFAULT_SHARED_MEMORY}
    found = [
        Mount("stage", names.STAGE_MOUNT, {"configMap": {"name": attempt.name}}, read_only=True),
        Mount("data", names.DATA_MOUNT, {"emptyDir": limit}),
        Mount("tmp", "/tmp", {"emptyDir": {}}),  # noqa: S108  # of the container
        Mount("shared-memory", "/dev/shm", {"emptyDir": shared}),  # noqa: S108
    ]
    if attempt.credentials is not None:
        found.append(_credentials(attempt.credentials))
    found += [_endpoint_key(index, secret) for index, secret in enumerate(attempt.endpoint_secrets)]
    if settings.progress_url is not None:
        found.append(_token(attempt, settings.progress_token_seconds))
    return found + [_own(volume) for volume in attempt.stage.pods.volumes or ()]


def _credentials(secret: str) -> Mount:
    """The S3 credentials: a Secret that is missing keeps the pod from starting, and the kubelet says so."""
    items = [{"key": key, "path": key} for key in (names.ACCESS_KEY_FILE, names.SECRET_KEY_FILE)]
    source = {"secret": {"secretName": secret, "defaultMode": SECRET_MODE, "items": items}}
    return Mount("credentials", names.CREDENTIALS_MOUNT, source, read_only=True)


def _endpoint_key(index: int, secret: str) -> Mount:
    """The key of an endpoint. The volume is numbered: a Secret's name may be as long as a volume's may."""
    items = [{"key": names.ENDPOINT_KEY_FILE, "path": names.ENDPOINT_KEY_FILE}]
    source = {"secret": {"secretName": secret, "defaultMode": SECRET_MODE, "items": items}}
    return Mount(f"endpoint-key-{index}", f"{names.ENDPOINT_KEYS_MOUNT}/{secret}", source, read_only=True)


def _token(attempt: StageAttempt, seconds: int) -> Mount:
    """A token that is good for one thing: to report progress of this one attempt."""
    audience = names.progress_audience(attempt.resolved.namespace, attempt.name)
    token = {"audience": audience, "expirationSeconds": seconds, "path": names.TOKEN_FILE}
    source = {"projected": {"defaultMode": SECRET_MODE, "sources": [{"serviceAccountToken": token}]}}
    return Mount("progress-token", names.TOKEN_MOUNT, source, read_only=True)


def _own(volume: Volume) -> Mount:
    """A volume the run asks for."""
    source: dict[str, Any]
    if volume.claim_name is not None:
        source = {"persistentVolumeClaim": {"claimName": volume.claim_name, "readOnly": volume.read_only}}
    elif volume.config_map_name is not None:
        source = {"configMap": {"name": volume.config_map_name}}
    else:
        source = {"secret": {"secretName": volume.secret_name, "defaultMode": SECRET_MODE}}
    return Mount(USER_PREFIX + volume.name, volume.mount_path, source, volume.read_only, volume.sub_path)
