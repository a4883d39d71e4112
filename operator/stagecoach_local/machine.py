"""The resources of this machine, and how the ranks of a stage are fitted to them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.spec import Stage
from stagecoach_api.stage_kind import Ranks
from stagecoach_core.quantities import threads_per_rank

CORES_PER_HEAVY_STAGE = 4
"""Two heavy stages that run concurrently with fewer cores each are slower than one after the other."""


@dataclass(frozen=True)
class Machine:
    """The resources that concurrent stages share."""

    cores: int
    """CPU cores this process may use."""
    gpus: int = 0
    """CUDA devices."""

    @property
    def heavy_slots(self) -> int:
        """Heavy stages that may run concurrently: one if there are GPUs, because they would share them."""
        return 1 if self.gpus else max(1, self.cores // CORES_PER_HEAVY_STAGE)

    @property
    def light_slots(self) -> int:
        """Light stages that may run concurrently, in addition to the heavy ones."""
        return self.cores


def this_machine() -> Machine:
    """Return the resources this process may use, from CPU affinity, the container's CPU quota and the visible GPUs."""
    return Machine(cores=_num_cores(), gpus=_num_gpus())


def num_ranks(stage: Stage, machine: Machine, nproc: int | None) -> int:
    """Return the number of ranks of `stage` on this machine: `nproc` if given, else what it requests, at most what
    the machine has.

    Some kinds always run as one rank. A stage that requests GPUs on a machine without any runs as one CPU rank.
    """
    if STAGE_KINDS[stage.kind].ranks is Ranks.ONE:
        return 1
    if nproc is not None:
        return nproc
    wanted = stage.resources.num_nodes * stage.resources.num_ranks_per_node
    if stage.resources.gpus_per_node:
        return max(1, min(wanted, machine.gpus))
    return max(1, min(wanted, machine.cores))


def missing_gpus(stage: Stage, machine: Machine) -> str | None:
    """Return a sentence on the GPUs that a stage requests and this machine lacks; None if it lacks none."""
    wanted = stage.resources.num_nodes * (stage.resources.gpus_per_node or 0)
    if wanted <= machine.gpus:
        return None
    ranks = num_ranks(stage, machine, None)
    where = f"{ranks} rank{'s' * (ranks != 1)} on {'GPUs' if machine.gpus else 'the CPU'}"
    has = machine.gpus or "none"
    return f"{stage.name} requests {wanted} GPU{'s' * (wanted != 1)}, this machine has {has}, so it runs as {where}"


def num_threads(stage: Stage, machine: Machine, ranks: int) -> int:
    """Return the CPU threads of each rank: its share of the cores, or its pod's CPU request if that is smaller.

    Independent of what else is running: the number of threads changes the rounding of sums, and with it the result.
    """
    share = max(1, machine.cores // ranks)
    return min(share, threads_per_rank(stage.resources) or share)


def admits(machine: Machine, kind: str, running: Iterable[str]) -> bool:
    """Return whether a stage of `kind` may start while stages of the `running` kinds run."""
    heavy = STAGE_KINDS[kind].heavy
    alike = sum(STAGE_KINDS[other].heavy is heavy for other in running)
    return alike < (machine.heavy_slots if heavy else machine.light_slots)


def _num_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _cpu_quota() or cores))


def _cpu_quota() -> int | None:
    """Return the container's CPU quota in whole cores (cgroup v2), None if there is no quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def _num_gpus() -> int:
    """Count NVIDIA's device files: querying the driver would need torch or another library."""
    if platform.system() != "Linux":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if visible is None:
        return present
    return min(present, len([item for item in visible.split(",") if item.strip() not in ("", "-1")]))
