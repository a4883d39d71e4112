"""The hardware that a stage asks for: the GPUs that the run names, or this machine's cores."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stagecoach_api.spec import Stage
from stagecoach_local.machine import Machine, num_ranks, num_threads

CPU_CORE_FLOPS = 4e10
"""Throughput of one core with a small model in fp32 or bf16, measured on this project's demo."""

GPU_UTILISATION = 0.4
"""Model FLOPs utilisation (MFU) of training. PaLM's table 3 lists 21 % to 46 % (arXiv 2204.02311)."""

GPUS = {
    "B200": (2250e12, 180),
    "H200": (989e12, 141),
    "H100": (989e12, 80),
    "H800": (989e12, 80),
    "A100": (312e12, 80),
    "A800": (312e12, 80),
    "L40S": (362e12, 48),
    "A10": (125e12, 24),
    "L4": (121e12, 24),
    "V100": (125e12, 32),
}
"""Peak dense bf16 FLOP/s (V100: fp16) and memory in GB, from NVIDIA's data sheets, by a word of the product's name."""
ASSUMED_GPU = "A100"
_MEMORY_IN_NAME = re.compile(r"(\d+)GB")


@dataclass(frozen=True)
class Hardware:
    """Processors of a stage."""

    name: str
    count: int
    flops: float
    """FLOP/s of each that training reaches."""
    gpu_bytes: float | None = None
    """Memory of each GPU; None for cores."""
    assumed: bool = False
    """Whether the run does not name the GPU."""

    @property
    def num_gpus(self) -> int:
        return self.count if self.gpu_bytes is not None else 0

    @property
    def total_flops(self) -> float:
        return self.flops * self.count

    def __str__(self) -> str:
        if self.gpu_bytes is None:
            return f"{self.count} core{'s' * (self.count != 1)}"
        return f"{self.count} × {self.name}{'?' if self.assumed else ''}"


def hardware_of(stage: Stage, machine: Machine) -> Hardware:
    """Return the GPUs that a stage requests, and without any the cores that it would use of this machine."""
    resources = stage.resources
    gpus = resources.num_nodes * (resources.gpus_per_node or 0)
    if not gpus:
        ranks = num_ranks(stage, machine, None)
        cores = min(machine.cores, ranks * num_threads(stage, machine, ranks))
        return Hardware("core", cores, CPU_CORE_FLOPS)
    labels = [resources.gpu_product or "", *(stage.pods.node_selector or {}).values()]
    named = next(((name, label) for label in labels for name in _words(label) if name in GPUS), None)
    name, label = named or (ASSUMED_GPU, "")
    peak, gigabytes = GPUS[name]
    stated = _MEMORY_IN_NAME.search(label)
    memory = float(stated[1]) if stated else float(gigabytes)
    return Hardware(name, gpus, peak * GPU_UTILISATION, memory * 1e9, assumed=named is None)


def _words(label: str) -> list[str]:
    """Return the words of a label such as `NVIDIA-A100-SXM4-80GB` or `nvidia-tesla-a100`."""
    return re.split(r"[^A-Z0-9]+", label.upper())
