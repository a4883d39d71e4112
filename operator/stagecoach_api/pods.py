"""How a stage's pods are placed on a cluster and what is mounted into them. A laptop passes over all of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stagecoach_api.base import Model, Name

Quantity = Annotated[
    str, Field(min_length=1, max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$")
]
"""A Kubernetes quantity, such as `96`, `500m` or `1000Gi`."""

LabelValue = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?$")]
LabelKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=317,
        pattern=r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$",
    ),
]
MountPath = Annotated[str, Field(min_length=2, max_length=512, pattern=r"^/[^:\\]+$")]


class Toleration(Model):
    """A taint the pods may be placed beside, as Kubernetes writes it."""

    key: LabelKey | None = None
    """Key of the taint. None: every taint; `operator` is `Exists` then."""

    operator: Literal["Equal", "Exists"] = "Equal"
    """Whether `value` must be the taint's. Default: Equal."""

    value: LabelValue | None = None
    """Value of the taint. None: the empty one; must be left out for `Exists`."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. None: every effect."""

    toleration_seconds: Annotated[int, Field(ge=0, le=10**8)] | None = None
    """Seconds a pod stays on a node that gets a `NoExecute` taint. None: for ever."""

    @model_validator(mode="after")
    def _exists_has_no_value(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("`operator: Exists` takes no `value`: leave one of them out")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("without `key` every taint is meant: write `operator: Exists`")
        return self


class Volume(Model):
    """Something mounted into the pods. Exactly one of `claimName`, `configMapName` and `secretName`."""

    name: Name
    """Unique name among the stage's volumes."""

    mount_path: MountPath
    """Folder in the container, absolute."""

    sub_path: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Folder of the volume that is mounted. None: all of it."""

    read_only: bool = True
    """Whether the pods may not write to it. Default: true."""

    claim_name: Name | None = None
    """A PersistentVolumeClaim in the run's namespace. None: another is given."""

    config_map_name: Name | None = None
    """A ConfigMap in the run's namespace. None: another is given."""

    secret_name: Name | None = None
    """A Secret in the run's namespace. None: another is given."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Volume:
        if sum(name is not None for name in (self.claim_name, self.config_map_name, self.secret_name)) != 1:
            raise ValueError("give exactly one of `claimName`, `configMapName` and `secretName`")
        return self


class FabricVariable(Model):
    """One setting of the libraries that ranks talk through."""

    name: Annotated[str, Field(max_length=128, pattern=r"^(NCCL|GLOO|UCX|FI|RCCL|TORCH_NCCL)_[A-Z0-9_]+$")]
    """Name of the variable, such as `NCCL_IB_HCA` or `NCCL_SOCKET_IFNAME`."""

    value: Annotated[str, Field(max_length=256)]
    """Its value."""


class Pods(Model):
    """Placement and surroundings of a stage's pods. In `defaults` or a stage; a field that is None takes the default's
    value."""

    node_selector: Annotated[dict[str, LabelValue], Field(max_length=32)] | None = None
    """Labels a node must have, beside `resources.gpuProduct`. None: none."""

    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] | None = None
    """Taints the pods tolerate, beside `nvidia.com/gpu` where they have GPUs. None: none."""

    volumes: Annotated[tuple[Volume, ...], Field(max_length=16)] | None = None
    """What else is mounted, such as a shared file system with inputs. None: nothing."""

    fabric: Annotated[tuple[FabricVariable, ...], Field(max_length=32)] | None = None
    """Settings of NCCL, Gloo, UCX and libfabric. None: the libraries' own, NCCL's warnings shown."""

    image_pull_secrets: Annotated[tuple[Name, ...], Field(max_length=8)] | None = None
    """Secrets in the run's namespace with which the image is fetched. None: the operator's setting."""

    service_account: Name | None = None
    """Service account the pods run as; its identity is the storage's where no credentials are given. They get no token
    for the API server. None: the operator's setting, else the namespace's `default`."""

    priority_class: Name | None = None
    """PriorityClass of the pods. None: the cluster's default."""
