"""The operator's settings: one frozen value, read once at start from a mounted file and the pod's own environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from stagecoach_api.base import Name
from stagecoach_api.spec import StageSettings, Storage
from stagecoach_api.stores.base import InvalidLocation
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_operator.permitted import Allowed, OwnNames
from stagecoach_operator.storage_access import FOLDER, AllowedStorage, Place, is_allowed, place_of

DEFAULT_FILE = Path("/etc/stagecoach/settings.yaml")
ENV_FILE = "STAGECOACH_SETTINGS_FILE"
"""Path of the settings file. If unset: `DEFAULT_FILE`."""

# Set by the Deployment through the downward API.
ENV_POD_NAME = "POD_NAME"
ENV_POD_NAMESPACE = "POD_NAMESPACE"

Port = Annotated[int, Field(ge=1, le=65535)]


class SettingsError(ValueError):
    """The settings file cannot be used; the message contains its path and the fields."""


class Settings(ManifestSettings):
    """All settings. Those of pods are inherited from `ManifestSettings`; field names are camelCase in the file."""

    namespaces: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000)] | None = None
    """Namespaces whose runs are reconciled; each needs a RoleBinding. If unset: all, which requires the ClusterRole."""

    pod_name: str = "stagecoach"
    """Name of this pod: the Lease's identity, so that a restarted container takes its Lease back at once."""

    pod_namespace: Name = "stagecoach-system"
    """Namespace of this pod and of the Lease."""

    trainer_code: str = ""
    """Identity of the trainer's code in `trainer_image`, as returned there by `stagecoach_api.code.code_identity()`:
    part of every stage digest. If empty: the contents of `trainer_code_file`, else the digest in `trainer_image`, else
    the operator refuses to start."""

    trainer_code_file: str | None = None
    """File to read `trainer_code` from if that is empty. The operator's image contains one for the trainer image built
    with it. If unset: no file is read."""

    storage: Storage = Storage()
    """Storage of runs that do not name one; also endpoint, region and credentials of those that do not set them."""

    allowed: Allowed = Allowed()
    """What runs may name: service accounts, Secrets, priority classes, tolerations, node selectors, images."""

    profiles: dict[Name, StageSettings] = Field(default_factory=dict, max_length=256)
    """Settings that stages take over by naming a profile, below their own and those of `defaults`. They are not limited
    by `allowed`."""

    own_service_account: Name | None = None
    """Service account of this pod, which no run may use. If unset: none is refused."""

    own_secrets: Annotated[tuple[Name, ...], Field(max_length=16)] = ()
    """Secrets in the pod's namespace that no run may use, such as the certificate's."""

    allowed_storage: Annotated[tuple[AllowedStorage, ...], Field(max_length=256)] = ()
    """Endpoints and buckets, in addition to those of `storage`, for which the operator may use its own credentials: to
    look up inputs and artifacts, and to write pointers. Inputs elsewhere are refused; artifacts elsewhere are looked up
    by the stages' own pods."""

    lease_name: Name = "stagecoach-operator"
    """Name of the Lease by which one replica is elected."""

    lease_seconds: Annotated[int, Field(ge=3, le=3600)] = 15
    """Duration of the Lease: how long it is respected without a renewal. It is renewed every third of this."""

    probe_port: Port = 8080
    """Port of liveness and readiness probes."""

    progress_port: Port = 8443
    """Port of the progress server."""

    progress_cert_file: str | None = None
    """The progress server's certificate (PEM). If unset, like the key: it serves plain HTTP."""

    progress_key_file: str | None = None
    """The certificate's key (PEM)."""

    progress_ca_file: str | None = None
    """File to read `progress_ca` from. If unset: `progress_ca` is used."""

    metrics_port: Port = 9090
    """Port of Prometheus metrics."""

    api_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Timeout of one request to the API server."""

    lost_node_seconds: Annotated[int, Field(ge=10, le=86_400)] = 300
    """Seconds after the end of a pod's grace period at which its node counts as lost: the pod is deleted without
    waiting for the node, and the next attempt starts."""

    leftover_seconds: Annotated[int, Field(ge=10, le=86_400)] = 120
    """Seconds that the pods of a successful attempt have to end. Afterwards its JobSet is deleted."""

    store_threads: Annotated[int, Field(ge=1, le=64)] = 4
    """Maximum number of concurrent calls to one endpoint of S3."""

    @property
    def installation(self) -> str:
        """Name of this installation of the operator: that of its Lease, which its replicas share."""
        return f"{self.pod_namespace}/{self.lease_name}"

    @property
    def code(self) -> str:
        """Identity of the code in the operator's own trainer image. Raises SettingsError if it is unknown."""
        _, _, digest = self.trainer_image.partition("@")
        if self.trainer_code or digest:
            return self.trainer_code or digest
        raise SettingsError(
            f"trainerCode is empty and trainerImage `{self.trainer_image}` has no digest: set one of them, "
            "because artifacts are identified by the code that made them"
        )

    @property
    def own_names(self) -> OwnNames:
        """What the operator uses itself, and gives to pods that set nothing else."""
        credentials = self.storage.credentials
        return OwnNames(
            namespace=self.pod_namespace,
            service_account=self.own_service_account,
            secrets=self.own_secrets,
            credentials=None if credentials is None else credentials.secret_name,
            endpoint=self.storage.endpoint,
            pod_service_account=self.service_account,
            pull_secrets=self.image_pull_secrets,
            image=self.trainer_image,
        )

    def allows_place(self, place: Place) -> bool:
        """Return whether the operator may use its own credentials for a place."""
        if place.endpoint == FOLDER:
            return _place(self.storage.uri, None) == place
        own = (_place(uri, self.storage.endpoint) for uri in (self.storage.uri, self.storage.inputs))
        return place in own or is_allowed(place, self.allowed_storage)

    def storage_of(self, given: Storage) -> Storage:
        """Return a run's storage, with unset fields taken from the operator's.

        Endpoint, region and credentials belong together: a run that sets one of them gets none of the operator's.
        Otherwise its pods could send the operator's credentials to an endpoint of the user's choice.
        """
        service = ("endpoint", "region", "credentials")
        open_fields = {name for name in ("uri", "inputs") if getattr(given, name) is None}
        if all(getattr(given, name) is None for name in service):
            open_fields |= set(service)
        return given.model_copy(update={name: getattr(self.storage, name) for name in open_fields})


def _place(uri: str | None, endpoint: str | None) -> Place | None:
    try:
        return None if uri is None else place_of(uri, endpoint)
    except InvalidLocation:
        return None


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings file and the pod's name and namespace. Raises SettingsError with all problems."""
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
    """Return the settings that are read from separate files."""
    contents = {}
    if settings.progress_ca_file is not None:
        contents["progress_ca"] = Path(settings.progress_ca_file).read_text()
    if settings.trainer_code_file is not None and not settings.trainer_code:
        contents["trainer_code"] = Path(settings.trainer_code_file).read_text().strip()
    return contents


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; {ENV_FILE} must name a file") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {error}") from error
    if not isinstance(document, dict | None):
        raise SettingsError(f"{path}: is a {type(document).__name__}; it must be a mapping of settings")
    return document or {}
