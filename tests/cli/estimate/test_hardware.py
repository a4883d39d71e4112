"""The hardware of a stage: what its resources and node labels name, or this machine's cores."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api.spec import Stage
from stagecoach_cli.estimate.hardware import Hardware, hardware_of
from stagecoach_local.machine import Machine
from tests.cli.makers import pretrain_stage


def hardware(machine: Machine | None = None, pods: dict[str, Any] | None = None, **resources: Any) -> Hardware:
    stage = pretrain_stage("base", "words", "one") | {"resources": resources, "pods": pods or {}}
    return hardware_of(Stage.model_validate(stage), machine or Machine(cores=8))


@pytest.mark.parametrize(
    ("product", "name", "peak", "gigabytes"),
    [
        ("NVIDIA-A100-SXM4-80GB", "A100", 312e12, 80),
        ("NVIDIA-A100-SXM4-40GB", "A100", 312e12, 40),
        ("NVIDIA-H100-80GB-HBM3", "H100", 989e12, 80),
        ("NVIDIA-L40S", "L40S", 362e12, 48),
        ("NVIDIA-L4", "L4", 121e12, 24),
        ("Tesla-V100-SXM2-16GB", "V100", 125e12, 16),
    ],
)
def test_gpus_are_those_that_the_stage_names(product: str, name: str, peak: float, gigabytes: int) -> None:
    found = hardware(nodes=2, gpusPerNode=4, gpuProduct=product)
    assert found == Hardware(name, 8, peak * 0.4, gigabytes * 1e9)
    assert str(found) == f"8 × {name}"


def test_a_node_selector_names_them_too_and_without_a_name_an_a100_is_assumed() -> None:
    selector = {"nodeSelector": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}}
    assert str(hardware(pods=selector, gpusPerNode=8)) == "8 × H100"
    assert str(hardware(gpusPerNode=8)) == "8 × A100?"


def test_without_gpus_it_is_the_cores_that_the_stage_would_use_here() -> None:
    assert str(hardware()) == "8 cores"
    assert str(hardware(cpu=1)) == "1 core"
    assert str(hardware(ranksPerNode=4, cpu=4)) == "4 cores"
    assert hardware().num_gpus == 0
