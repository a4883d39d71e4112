"""The ranks of a stage: this process's rank, and the process group. torch is imported only if there is a group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from stagecoach_trainer.runtime.context import World


def world_from(environment: Mapping[str, str]) -> World:
    """Return this process's rank and the group's size from torchrun's variables; without them, one rank."""

    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    size = number("WORLD_SIZE", 1)
    return World(
        rank=number("RANK", 0),
        local_rank=number("LOCAL_RANK", 0),
        size=size,
        local_size=number("LOCAL_WORLD_SIZE", size),
    )


@contextmanager
def process_group(world: World, alone: bool = False) -> Iterator[None]:
    """Join the other ranks (gloo on CPUs, NCCL on GPUs) for as long as the block lasts; no-op at one rank.

    `alone`: create a group of one rank, which DeepSpeed requires for offload.
    """
    if world.size == 1 and not alone:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()
