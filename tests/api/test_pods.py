"""Settings of pods are refused as the API server refuses them in a pod."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api.problems import InvalidRun
from stagecoach_api.reading.validation import validate


def problems(defaults: dict[str, Any]) -> str:
    stage = {"name": "a", "data": {"sources": [{"uri": "x.txt"}]}}
    spec = {"defaults": defaults, "stages": [stage]}
    body = {"apiVersion": "stagecoach.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": "demo"}, "spec": spec}
    try:
        validate(body)
    except InvalidRun as error:
        return str(error)
    return ""


def volume(**fields: Any) -> dict[str, Any]:
    return {"name": "v", "mountPath": "/mnt/v", "claimName": "c", **fields}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a fraction of a byte": ({"resources": {"memory": "64m"}}, "resources.memory"),
    "no CPU": ({"resources": {"cpu": "0"}}, "resources.cpu"),
    "a negative quantity": ({"resources": {"extended": {"rdma/hca": "-1"}}}, "resources.extended"),
    "a unit that does not exist": ({"resources": {"memory": "4GB"}}, "resources.memory"),
    "two mounts at one path": ({"pods": {"volumes": [volume(), volume(name="w")]}}, "`mountPath` must be different"),
    "two volumes of one name": (
        {"pods": {"volumes": [volume(), volume(mountPath="/mnt/w")]}},
        "`name` must be different",
    ),
    "a mount over the operator's": ({"pods": {"volumes": [volume(mountPath="/dev/shm")]}}, "mountPath"),  # noqa: S108
    "a folder above the volume": ({"pods": {"volumes": [volume(subPath="../other")]}}, "subPath"),
    "an absolute folder of a volume": ({"pods": {"volumes": [volume(subPath="/etc")]}}, "subPath"),
    "a volume whose name has no room for our prefix": ({"pods": {"volumes": [volume(name="v" * 57)]}}, "name"),
    "a label of 100 characters": ({"pods": {"nodeSelector": {"pool": "v" * 100}}}, "nodeSelector"),
    "a key of 100 characters": ({"pods": {"nodeSelector": {"k" * 100: "v"}}}, "each key must be the key of a label"),
    "a key with a domain that is none": ({"pods": {"nodeSelector": {"a..b/k": "v"}}}, "each key must be"),
    "a key with two slashes": ({"pods": {"nodeSelector": {"a/b/c": "v"}}}, "each key must be"),
    "a taint with a key of 100 characters": (
        {"pods": {"tolerations": [{"key": "k" * 100, "operator": "Exists"}]}},
        "tolerations[0].key",
    ),
    "seconds of another effect": (
        {"pods": {"tolerations": [{"key": "k", "operator": "Exists", "tolerationSeconds": 3}]}},
        "only for `effect: NoExecute`",
    ),
    "a GPU product that is no label": ({"resources": {"gpuProduct": "A100 80GB"}}, "gpuProduct"),
    "GPUs in two places": ({"resources": {"extended": {"nvidia.com/gpu": "1"}}}, "has no field of its own"),
    "memory in two places": ({"resources": {"extended": {"memory": "1Gi"}}}, "has no field of its own"),
    "a resource of Kubernetes that does not exist": ({"resources": {"extended": {"kubernetes.io/x": 1}}}, "each key"),
    "one variable twice": (
        {"pods": {"fabric": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "NCCL_DEBUG", "value": "WARN"}]}},
        "`name` must be different for each of `fabric`",
    ),
}


@pytest.mark.parametrize(("defaults", "text"), REFUSED.values(), ids=REFUSED)
def test_what_no_pod_can_have_is_refused_with_its_field(defaults: dict[str, Any], text: str) -> None:
    """A JobSet with it is accepted, and its pods never appear: the reason would be an event of a Job."""
    assert text in problems(defaults)


ACCEPTED: dict[str, dict[str, Any]] = {
    "quantities": {
        "resources": {"cpu": "500m", "memory": "1.5Gi", "extended": {"rdma/hca": 8, "hugepages-2Mi": "4Mi"}}
    },
    "scratch space of the node": {"resources": {"extended": {"ephemeral-storage": "10Gi"}}},
    "labels": {"pods": {"nodeSelector": {"topology.kubernetes.io/zone": "eu-1", "pool": "", "k" * 63: "v" * 63}}},
    "a volume": {"pods": {"volumes": [volume(subPath="a/b", name="v" * 56)]}},
    "a toleration": {"pods": {"tolerations": [{"key": "k", "effect": "NoExecute", "tolerationSeconds": 3}]}},
}


@pytest.mark.parametrize("defaults", ACCEPTED.values(), ids=ACCEPTED)
def test_what_pods_can_have_is_accepted(defaults: dict[str, Any]) -> None:
    assert problems(defaults) == ""
