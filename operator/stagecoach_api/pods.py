"""How a stage's pods are placed on a cluster and what is mounted into them. A laptop passes over all of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stagecoach_api.base import Model, Name
from stagecoach_api.constraints import Constraint, either, equals, exactly_one, given, implies, missing

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

    constraints = (
        Constraint(
            implies(equals("operator", "Exists"), missing("value")),
            "`operator: Exists` takes no `value`",
            "leave one of them out",
        ),
        Constraint(
            either(given("key"), equals("operator", "Exists")),
            "without `key` every taint is meant",
            "write `operator: Exists`",
        ),
    )

    key: LabelKey | None = None
    """Key of the taint. If unset: every taint; `operator` is `Exists` then."""

    operator: Literal["Equal", "Exists"] = "Equal"
    """Whether `value` must be the taint's. Default: Equal."""

    value: LabelValue | None = None
    """Value of the taint. If unset: the empty one; must be left out for `Exists`."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. If unset: every effect."""

    toleration_seconds: Annotated[int, Field(ge=0, le=10**8)] | None = None
    """Seconds a pod stays on a node that gets a `NoExecute` taint. If unset: for ever."""


class Volume(Model):
    """Something mounted into the pods. Exactly one of `claimName`, `configMapName` and `secretName`."""

    constraints = (exactly_one("claim_name", "config_map_name", "secret_name"),)

    name: Name
    """Unique name among the stage's volumes."""

    mount_path: MountPath
    """Folder in the container, absolute."""

    sub_path: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Folder of the volume that is mounted. If unset: all of it."""

    read_only: bool = True
    """Whether the pods may not write to it. Default: true."""

    claim_name: Name | None = None
    """A PersistentVolumeClaim in the run's namespace. If unset: another is given."""

    config_map_name: Name | None = None
    """A ConfigMap in the run's namespace. If unset: another is given."""

    secret_name: Name | None = None
    """A Secret in the run's namespace. If unset: another is given."""


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
    """Labels a node must have, beside `resources.gpuProduct`. If unset: none."""

    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] | None = None
    """Taints the pods tolerate, beside `nvidia.com/gpu` where they have GPUs. If unset: none."""

    volumes: Annotated[tuple[Volume, ...], Field(max_length=16)] | None = None
    """What else is mounted, such as a shared file system with inputs. If unset: nothing."""

    fabric: Annotated[tuple[FabricVariable, ...], Field(max_length=32)] | None = None
    """Settings of NCCL, Gloo, UCX and libfabric. If unset: the libraries' own, NCCL's warnings shown."""

    image_pull_secrets: Annotated[tuple[Name, ...], Field(max_length=8)] | None = None
    """Secrets in the run's namespace with which the image is fetched. If unset: the operator's setting."""

    service_account: Name | None = None
    """Service account the pods run as; its identity is the storage's where no credentials are given. They get no token
    for the API server. If unset: the operator's setting, else the namespace's `default`."""

    priority_class: Name | None = None
    """PriorityClass of the pods. If unset: the cluster's default."""
