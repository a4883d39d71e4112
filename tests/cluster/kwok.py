"""KWOK: simulated GPU nodes. The real scheduler places pods there, and KWOK sets their status as if they ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.cluster.build import Builder
from tests.cluster.control_plane import ControlPlane
from tests.cluster.layout import LOOPBACK, Layout
from tests.cluster.processes import Processes
from tests.cluster.report import timed

STAGES = (
    "node/fast/node-initialize.yaml",
    "node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
    "pod/fast/pod-ready.yaml",
    "pod/fast/pod-delete.yaml",
)
"""KWOK's own stages that are used: nodes become Ready, pods run and are deleted at once."""
PODS = Path(__file__).with_name("pretended-pods.yaml")
SIMULATED = "kwok.x-k8s.io/node"
READY_SECONDS = 60
GPUS_PER_NODE = 8
POD_NETWORK = "10.216.0.1/16"
"""Addresses of simulated pods, where nothing listens."""


def start(layout: Layout, builder: Builder, processes: Processes, control_plane: ControlPlane) -> None:
    """Start KWOK for nodes that have its annotation; there are none at first."""
    stages = [*(builder.folder("kwok", "stages") / stage for stage in STAGES), PODS]
    command: list[str | Path] = [builder.program("kwok", "kwok"), f"--kubeconfig={layout.kubeconfig}"]
    command += ["--manage-all-nodes=false", f"--manage-nodes-with-annotation-selector={SIMULATED}=fake"]
    command += [f"--server-address={LOOPBACK}:{layout.port('kwok')}", f"--cidr={POD_NETWORK}"]
    command += ["--node-lease-duration-seconds=40", f"--config={','.join(map(str, stages))}"]
    kubectl = control_plane.kubectl
    with timed("kwok", "ready"):
        processes.start("kwok", command)
        kubectl.apply([gpu_node("kwok-probe", "none")])
        ready = ("wait", "--for=condition=Ready", "node/kwok-probe", "--timeout=1s")
        processes.wait_for("kwok", lambda: kubectl.succeeds(*ready), READY_SECONDS)
        kubectl("delete", "node", "kwok-probe")


def gpu_node(name: str, product: str, gpus: int = GPUS_PER_NODE) -> dict[str, Any]:
    """Return a simulated node with a GPU product. Its taint repels pods that do not request GPUs."""
    resources = {
        "cpu": "128",
        "memory": "2048Gi",
        "pods": "110",
        "ephemeral-storage": "4096Gi",
        "nvidia.com/gpu": str(gpus),
    }
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "nvidia.com/gpu.product": product,
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {SIMULATED: "fake"}},
        "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
        "status": {"allocatable": resources, "capacity": resources},
    }
