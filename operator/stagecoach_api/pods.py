"""Placement of a stage's pods on a cluster, and their volumes and settings. Ignored on a laptop."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from stagecoach_api.base import Model, Name
from stagecoach_api.constraints import (
    Constraint,
    ConstraintError,
    both,
    differs,
    distinct,
    either,
    equals,
    exactly_one,
    given,
    implies,
    missing,
)
from stagecoach_api.names import POD_MOUNTS

MIN_BYTES = 10**6
"""The least amount of memory without a unit. A smaller number was meant as GiB: no process starts in 64 bytes."""

_ABOVE_ZERO = r"([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
CPU_PATTERN = rf"^{_ABOVE_ZERO}[mk]?$"
MEMORY_PATTERN = rf"^([1-9][0-9]{{6,}}|{_ABOVE_ZERO}(k|Ki|M|Mi|G|Gi|T|Ti|P|Pi))$"


def _as_text(value: Any) -> Any:
    """Return a whole number as text, the one form in which a quantity is kept and compared."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _schema(pattern: str, minimum: int) -> dict[str, Any]:
    """Return the JSON schema of a quantity: text that matches `pattern`, or a whole number of at least `minimum`.

    Manifests of Kubernetes have both forms, `cpu: 4` and `cpu: 500m` (`x-kubernetes-int-or-string`).
    """
    return {"type": ["integer", "string"], "minimum": minimum, "minLength": 1, "maxLength": 32, "pattern": pattern}


Quantity = Annotated[
    str,
    Field(min_length=1, max_length=32, pattern=QUANTITY_PATTERN),
    BeforeValidator(_as_text),
    WithJsonSchema(_schema(QUANTITY_PATTERN, 0)),
]
"""A Kubernetes quantity, such as `96`, `500m` or `1000Gi`."""

Cpus = Annotated[
    str,
    Field(min_length=1, max_length=32, pattern=CPU_PATTERN),
    BeforeValidator(_as_text),
    WithJsonSchema(_schema(CPU_PATTERN, 1)),
]
"""A number of CPUs above 0, such as `4`, `0.5` or `500m`."""

Memory = Annotated[
    str,
    Field(min_length=1, max_length=32, pattern=MEMORY_PATTERN),
    BeforeValidator(_as_text),
    WithJsonSchema(_schema(MEMORY_PATTERN, MIN_BYTES)),
]
"""An amount of memory, such as `64Gi`; `64m` would be a fraction of a byte."""

LabelValue = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?$")]
KEY_PATTERN = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?$"
)
"""A qualified name: a DNS name and `/`, which may be left out, and at most 63 characters."""
KEY_CHARACTERS = 253
LabelKey = Annotated[str, Field(min_length=1, max_length=KEY_CHARACTERS, pattern=KEY_PATTERN)]
MountPath = Annotated[str, Field(min_length=2, max_length=512, pattern=r"^(/\.{0,2}[^/:\\.][^/:\\]*)+$")]
"""An absolute path in one spelling only: no doubled or trailing `/`, no part that is `.` or `..`."""


def keys_match(pattern: str, rule: str, remedy: str) -> AfterValidator:
    """Return a check of a mapping's keys. A structural schema has no keyword for it, so the operator checks it."""

    def check(mapping: dict[str, str]) -> dict[str, str]:
        wrong = [key for key in mapping if len(key) > KEY_CHARACTERS or not re.fullmatch(pattern, key)]
        if wrong:
            raise ConstraintError(Constraint(given("keys"), f"{rule}, not `{wrong[0][:80]}`", remedy))
        return mapping

    return AfterValidator(check)


NodeLabels = Annotated[
    dict[str, LabelValue],
    Field(max_length=32),
    keys_match(
        KEY_PATTERN, "each key must be the key of a label", "write `name` or `domain/name`, 63 characters at most"
    ),
]
"""Labels by their keys."""


class Toleration(Model):
    """A taint that the pods tolerate, as in the Kubernetes API."""

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
        Constraint(
            either(missing("toleration_seconds"), equals("effect", "NoExecute")),
            "`tolerationSeconds` is only for `effect: NoExecute`",
            "set that, or leave `tolerationSeconds` out",
        ),
    )

    key: LabelKey | None = None
    """Key of the taint. If unset: every taint; `operator` must be `Exists`."""

    operator: Literal["Equal", "Exists"] = "Equal"
    """`Equal` matches a taint with the same `value`; `Exists` matches any value."""

    value: LabelValue | None = None
    """Value of the taint. Must be unset for `Exists`. If unset: the empty value."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. If unset: every effect."""

    toleration_seconds: Annotated[int, Field(ge=0, le=10**8)] | None = None
    """Seconds that a pod stays on a node that gets a `NoExecute` taint. If unset: without limit."""


class Volume(Model):
    """A volume mounted into the pods. Exactly one of `claimName`, `configMapName` and `secretName` must be set."""

    constraints = (
        exactly_one("claim_name", "config_map_name", "secret_name"),
        Constraint(
            both(*(differs("mount_path", path) for path in POD_MOUNTS)),
            f"`mountPath` must not be one that the operator uses ({', '.join(POD_MOUNTS)})",
            "mount it elsewhere",
        ),
    )

    name: Annotated[Name, Field(max_length=56)]
    """Name of the volume, unique in the stage."""

    mount_path: MountPath
    """Absolute path in the container."""

    sub_path: (
        Annotated[
            str, Field(min_length=1, max_length=512, pattern=r"^\.{0,2}[^/:\\.][^/:\\]*(/\.{0,2}[^/:\\.][^/:\\]*)*$")
        ]
        | None
    ) = None
    """Folder of the volume to mount. If unset: the whole volume."""

    read_only: bool = True
    """Mount the volume read-only."""

    claim_name: Name | None = None
    """Name of a PersistentVolumeClaim in the run's namespace. If unset: another source is set."""

    config_map_name: Name | None = None
    """Name of a ConfigMap in the run's namespace. If unset: another source is set."""

    secret_name: Name | None = None
    """Name of a Secret in the run's namespace. If unset: another source is set."""


class FabricVariable(Model):
    """A setting of the communication libraries."""

    name: Annotated[str, Field(max_length=128, pattern=r"^(NCCL|GLOO|UCX|FI|RCCL|TORCH_NCCL)_[A-Z0-9_]+$")]
    """Name of the environment variable, such as `NCCL_IB_HCA` or `NCCL_SOCKET_IFNAME`."""

    value: Annotated[str, Field(max_length=256)]
    """Value of the variable."""


class Placement(StrEnum):
    """How the pods of a stage are placed relative to each other."""

    SPREAD = "spread"
    PREFER_SPREAD = "preferSpread"
    PACK = "pack"


class Pods(Model):
    """Placement and environment of a stage's pods. May be set in `defaults` and in a stage; fields that a stage leaves
    unset are taken from `defaults`."""

    constraints = (
        Constraint(
            distinct("volumes", "mount_path"),
            "`mountPath` must be different for each of the `volumes`",
            "mount one of the two elsewhere",
        ),
        Constraint(
            distinct("volumes", "name"), "`name` must be different for each of the `volumes`", "rename one of the two"
        ),
        Constraint(
            distinct("fabric", "name"), "`name` must be different for each of `fabric`", "leave one of the two out"
        ),
    )

    node_selector: NodeLabels | None = None
    """Labels a node must have, in addition to `resources.gpuProduct`. If unset: none."""

    placement: Placement | None = None
    """How several pods of the stage are placed. `spread`: on a node each, or they wait. `preferSpread`: on a node each
    if possible. `pack`: on as few nodes as possible. If unset: `spread` with GPUs, else `preferSpread`."""

    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] | None = None
    """Taints the pods tolerate, in addition to `nvidia.com/gpu` if they have GPUs. If unset: none."""

    volumes: Annotated[tuple[Volume, ...], Field(max_length=16)] | None = None
    """Additional volumes, such as a shared file system with inputs. If unset: none."""

    fabric: Annotated[tuple[FabricVariable, ...], Field(max_length=32)] | None = None
    """Settings of NCCL, Gloo, UCX and libfabric. If unset: the libraries' defaults, with NCCL's warnings shown."""

    image_pull_secrets: Annotated[tuple[Name, ...], Field(max_length=8)] | None = None
    """Names of the Secrets in the run's namespace used to pull the image. If unset: the operator's setting."""

    service_account: Name | None = None
    """Service account of the pods. Its identity is used for the storage if no credentials are given. Pods get no token
    for the API server. If unset: the operator's setting, or else the namespace's `default`."""

    priority_class: Name | None = None
    """PriorityClass of the pods. If unset: the cluster's default."""
