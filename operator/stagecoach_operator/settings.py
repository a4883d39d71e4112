"""The operator's settings: one frozen value, read once at start from a mounted file and the pod's own environment."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from stagecoach_api.base import Name
from stagecoach_api.spec import Storage
from stagecoach_core.manifests.settings import BuildSettings

DEFAULT_FILE = Path("/etc/stagecoach/settings.yaml")
ENV_FILE = "STAGECOACH_SETTINGS_FILE"
"""Path of the settings file. Unset: `DEFAULT_FILE`."""

# Set by the Deployment through the downward API.
ENV_POD_NAME = "POD_NAME"
ENV_POD_NAMESPACE = "POD_NAMESPACE"

Port = Annotated[int, Field(ge=1, le=65535)]


class SettingsError(ValueError):
    """The settings file cannot be used; the message names file and fields."""


class Settings(BuildSettings):
    """All settings. What pods are made of is inherited from `BuildSettings`; field names are camelCase in the file."""

    namespace: Name | None = None
    """Namespace whose runs are worked on. None: all (needs the ClusterRole)."""

    pod_name: str = "stagecoach"
    """Name of this pod: the Lease's identity, so that a restarted container takes its Lease back at once."""

    pod_namespace: Name = "stagecoach-system"
    """Namespace of this pod: where the Lease lies."""

    trainer_code: str = ""
    """Identity of the trainer's code in `trainer_image`, as `stagecoach_api.code.code_identity()` says it there: part
    of every stage digest. Empty: what `trainer_code_file` says, else the image's digest if it is given by one, else the
    operator refuses to start."""

    trainer_code_file: str | None = None
    """File to read `trainer_code` from where that is empty: the operator's image has one for the trainer's image that
    is built beside it. None: none."""

    storage: Storage = Storage()
    """Storage of runs that name none, and endpoint, region and credentials of those that leave them open."""

    allowed_images: Annotated[tuple[str, ...], Field(max_length=256)] | None = None
    """Images that stages may name, `*` standing for anything; `trainer_image` is always allowed. None: any image."""

    lease_name: Name = "stagecoach-operator"
    """Lease that makes one replica the active one."""

    lease_seconds: Annotated[int, Field(ge=3, le=3600)] = 15
    """How long a Lease that is not renewed is respected; it is renewed every third of that."""

    probe_port: Port = 8080
    """Port of liveness and readiness probes."""

    progress_port: Port = 8443
    """Port of the progress server."""

    progress_cert_file: str | None = None
    """The progress server's certificate (PEM). None, as the key: it serves plain HTTP."""

    progress_key_file: str | None = None
    """The certificate's key (PEM)."""

    progress_ca_file: str | None = None
    """File to read `progress_ca` from. None: `progress_ca` as it stands."""

    metrics_port: Port = 9090
    """Port of Prometheus metrics."""

    api_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0
    """How long one call to the API server may take."""

    store_threads: Annotated[int, Field(ge=1, le=64)] = 8
    """Calls to S3 at the same time."""

    @property
    def code(self) -> str:
        """Identity of the code of the operator's own trainer image. Raises SettingsError where it is not known."""
        _, _, digest = self.trainer_image.partition("@")
        if self.trainer_code or digest:
            return self.trainer_code or digest
        raise SettingsError(
            f"trainerCode is empty and trainerImage `{self.trainer_image}` has no digest: give one of them, or "
            "artifacts cannot be told apart by the code that made them"
        )

    def allows_image(self, image: str | None) -> bool:
        """Tell whether a stage may name this image; None is the operator's own."""
        if image is None or image == self.trainer_image or self.allowed_images is None:
            return True
        return any(fnmatch.fnmatchcase(image, pattern) for pattern in self.allowed_images)

    def storage_of(self, given: Storage) -> Storage:
        """Return a run's storage, what it leaves open taken from the operator's.

        Endpoint, region and credentials belong together: a run that names one of them takes none of the operator's.
        """
        service = ("endpoint", "region", "credentials")
        open_fields = {name for name in ("uri", "inputs") if getattr(given, name) is None}
        if all(getattr(given, name) is None for name in service):
            open_fields |= set(service)
        return given.model_copy(update={name: getattr(self.storage, name) for name in open_fields})


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings file and what the Deployment says of this pod. Raises SettingsError with all problems."""
    path = Path(environment.get(ENV_FILE, DEFAULT_FILE))
    document = _read(path)
    own = {"podName": environment.get(ENV_POD_NAME), "podNamespace": environment.get(ENV_POD_NAMESPACE)}
    document |= {name: value for name, value in own.items() if value}
    try:
        settings = Settings.model_validate(document)
        return settings.model_copy(update=_read_files(settings))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False)]
        raise SettingsError(f"{path}: {'; '.join(problems)}") from None
    except OSError as error:
        raise SettingsError(f"{path}: progressCaFile, trainerCodeFile: {error}") from error


def _read_files(settings: Settings) -> dict[str, str]:
    """Return the settings that stand in files of their own."""
    found = {}
    if settings.progress_ca_file is not None:
        found["progress_ca"] = Path(settings.progress_ca_file).read_text()
    if settings.trainer_code_file is not None and not settings.trainer_code:
        found["trainer_code"] = Path(settings.trainer_code_file).read_text().strip()
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; {ENV_FILE} must name a file") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: no YAML: {error}") from error
    if not isinstance(document, dict | None):
        raise SettingsError(f"{path}: is a {type(document).__name__}; it must be a mapping of settings")
    return document or {}
