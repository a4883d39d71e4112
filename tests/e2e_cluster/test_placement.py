"""Stages for A100s on the real scheduler with simulated nodes: all pods are placed or none, with the reason why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.kwok import gpu_node
from tests.e2e_cluster.queues import queue_objects, queue_with_quota
from tests.e2e_cluster.world import Run, World, training_run

pytestmark = pytest.mark.cluster

A100, H100 = "NVIDIA-A100-SXM4-80GB", "NVIDIA-H100-80GB-HBM3"
OF_A100 = {"nodeLabels": {"nvidia.com/gpu.product": A100}}
NODES = 16
QUEUE = "research"
ENDLESS = "registry.example.com/endless@sha256:" + "0" * 64
"""Image of simulated pods that run until they are deleted."""
BRIEF = "registry.example.com/brief@sha256:" + "0" * 64
MANY = 1000


@pytest.fixture(scope="module", autouse=True)
def nodes(world: World) -> Iterator[None]:
    """Sixteen nodes with eight A100s each, and sixteen with eight H100s."""
    made = [gpu_node(f"{kind}-{index}", product) for kind, product in KINDS.items() for index in range(NODES)]
    world.apply(*made)
    yield
    world.kubectl("delete", "nodes", *(node["metadata"]["name"] for node in made))


KINDS = {"a100": A100, "h100": H100}


@pytest.fixture(scope="module")
def queue(world: World, namespace: str) -> Iterator[str]:
    """A queue with quota for fifteen of the A100 nodes."""
    with queue_with_quota(world, namespace, QUEUE, quota_of(NODES - 1), OF_A100) as name:
        yield name


def quota_of(nodes: int) -> dict[str, str]:
    return {"nvidia.com/gpu": str(nodes * 8), "cpu": "100000"}


def stage(name: str, nodes: int, image: str = ENDLESS, **resources: Any) -> dict[str, Any]:
    """Return a stage whose pods are only placed, not run."""
    requested = {"nodes": nodes, "gpusPerNode": 8, "gpuProduct": A100, "cpu": "8", **resources}
    return {
        "name": name,
        "image": image,
        "resources": {field: value for field, value in requested.items() if value is not None},
        "pretrain": {
            "model": {"uri": "data"},
            "data": [{"uri": "data/english.jsonl.gz", "format": "text"}],
            "sequenceLength": 128,
            "batch": {"tokens": 128 * 8 * nodes, "microBatchRows": 1},
            "budget": {"steps": 1},
            "optimizer": {"learningRate": 1.0e-3},
        },
    }


def placed(run: Run) -> list[str]:
    """Return the node of every pod that has one."""
    return [pod["spec"]["nodeName"] for pod in run.pods() if pod["spec"].get("nodeName")]


def test_a_stage_of_16_nodes_gets_all_of_them_or_none(world: World, namespace: str, queue: str) -> None:
    body = training_run(world, namespace, "sixteen", [{**stage("large", NODES), "queue": {"name": queue}}])
    run = world.submit(body)
    run.wait("it waits for quota", lambda: run.has("QuotaReserved", "WaitingForQuota"), 30)
    run.wait("Kueue's message is shown", lambda: "nvidia.com/gpu" in run.condition("QuotaReserved")["message"], 30)
    assert run.pods() == []

    world.apply(*queue_objects(namespace, queue, quota_of(NODES), OF_A100))
    run.runs_stage("large", 120)
    assert sorted(placed(run)) == sorted(f"a100-{index}" for index in range(NODES))
    assert run.condition("QuotaReserved")["reason"] == "Admitted"
    run.delete()


def test_a_stage_that_fits_on_no_node_reports_why(world: World, namespace: str) -> None:
    run = world.submit(training_run(world, namespace, "nowhere", [stage("large", 1, gpuProduct="NVIDIA-B200")]))
    run.wait("the reason is shown", lambda: run.condition("Progressing")["reason"] == "Unschedulable", 20)
    assert "didn't match Pod's node affinity/selector" in run.condition("Progressing")["message"]
    run.delete()


def test_a_stage_of_a_thousand_pods_starts_and_ends(world: World, namespace: str) -> None:
    many = stage("many", MANY, BRIEF, gpusPerNode=0, gpuProduct=None, cpu="1")
    many["pods"] = {
        "nodeSelector": {"nvidia.com/gpu.product": A100},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    }
    run = world.submit(training_run(world, namespace, "thousand", [many]))
    run.complete(420)
    assert run.stage("many")["attempt"] == 1

    def succeeded() -> int:
        return sum(pod["status"]["phase"] == "Succeeded" for pod in run.pods())

    run.wait("every pod has ended", lambda: succeeded() == MANY, 240)
    assert {node.partition("-")[0] for node in placed(run)} == {"a100"}
    run.delete()
