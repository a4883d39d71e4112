"""Kueue's objects for the end-to-end suite: a flavour, a cluster queue with quota, a local queue in a namespace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.e2e_cluster.world import World

KUEUE = {"apiVersion": "kueue.x-k8s.io/v1beta2"}


@contextmanager
def queue_with_quota(
    world: World,
    namespace: str,
    name: str,
    quota: Mapping[str, str],
    flavor: Mapping[str, Any] | None = None,
    preempts: bool = False,
) -> Iterator[str]:
    """Create a queue with a quota of each resource; delete it afterwards. `flavor`: spec that selects its nodes."""
    world.apply(*queue_objects(namespace, name, quota, flavor or {}, preempts))
    try:
        yield name
    finally:
        world.kubectl("delete", "clusterqueue", name, "--wait=false")


def queue_objects(
    namespace: str, name: str, quota: Mapping[str, str], flavor: Mapping[str, Any], preempts: bool = False
) -> list[dict[str, Any]]:
    resources = [{"name": resource, "nominalQuota": amount} for resource, amount in quota.items()]
    group = {"coveredResources": list(quota), "flavors": [{"name": name, "resources": resources}]}
    spec: dict[str, Any] = {"namespaceSelector": {}, "resourceGroups": [group]}
    if preempts:
        spec["preemption"] = {"withinClusterQueue": "LowerPriority"}
    return [
        {**KUEUE, "kind": "ResourceFlavor", "metadata": {"name": name}, "spec": dict(flavor)},
        {**KUEUE, "kind": "ClusterQueue", "metadata": {"name": name}, "spec": spec},
        {
            **KUEUE,
            "kind": "LocalQueue",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"clusterQueue": name},
        },
    ]


def priority_class(name: str, value: int) -> dict[str, Any]:
    """Return a priority class for Kueue."""
    return {**KUEUE, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": value}
