"""The cases of `test_ppo_ranks.py`: the toy trained with each way of sharding.

A case is ZeRO stage and precision, `judge` for rewards of a sharded reward model, `shards` for answers of a sharded
policy, or `guards` for rolling back to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_api.training import Precision, Sharding
from stagecoach_trainer.engine.precision import DTYPES
from stagecoach_trainer.engine.sharded import shard_frozen
from stagecoach_trainer.ppo import samplers
from stagecoach_trainer.ppo.samplers import CopySampler
from stagecoach_trainer.rewards.model import ModelTerm
from stagecoach_trainer.rewards.term import Completion
from stagecoach_trainer.runtime.checkpoint_paths import checkpoints_folder, complete_checkpoints
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import Diverged, Interrupted
from tests.trainer.loop.makers import context, training
from tests.trainer.ppo.makers import (
    digit_judge,
    digit_model,
    ranks_configuration,
    reward_of,
    run_judged,
    run_to_end,
    uneven_configuration,
    with_adapter,
)

CPU = torch.device("cpu")
PRECISIONS = (Precision.FP32, Precision.BF16)
ROUNDS = ((7, 2), (0, 4), (1, 0), (0, 0))
"""Answers that each rank scores, round by round."""


def report(folder: Path, cases: Sequence[str], world: World) -> dict[str, Any]:
    """Return the results of each case."""
    return {case: _result(folder, case, world) for case in cases}


def _result(folder: Path, case: str, world: World) -> dict[Any, Any]:
    match case:
        case "judge":
            history = {stage: run_judged(context(folder / f"judge{stage}", world), stage) for stage in (0, 3)}
            scores = {item: [judge(world, item, shared) for shared in (False, True)] for item in PRECISIONS}
            return {"history": history, **scores}
        case "shards":
            return {
                kind: [answer(folder / f"{kind}{whole}", world, kind, whole) for whole in (True, False)]
                for kind in ("full", "lora")
            }
        case "guards":
            return go_back(folder / "guards", world)
        case _:
            config = ranks_configuration(case)
            interrupt(folder / case / "resumed", world, config)
            return {name: run_to_end(context(folder / case / name, world), config) for name in ("whole", "resumed")}


def judge(world: World, precision: Precision, shared: bool) -> dict[str, Any]:
    """Score random answers in rounds; return the rewards of all ranks, and the bytes of this rank's parameters."""
    term = ModelTerm(digit_judge(DTYPES[precision]), batch_rows=3)
    rewards = reward_of(("judge", term, 1.0))
    if shared:
        config = training(sharding=Sharding(zero=3), precision=precision)
        rewards.shard_models(lambda module: shard_frozen(module, config, world, CPU), CPU, world)
    random = np.random.default_rng(world.rank)
    found = []
    for counts in ROUNDS:
        texts = ["".join(map(str, random.integers(0, 10, 1 + number))) for number in range(counts[world.rank])]
        batch = [Completion(({"role": "user", "content": "12"},), text, len(text), ended=True) for text in texts]
        found.append([judgement.total for judgement in rewards.score(batch)])
    everybody: list[Any] = [None] * world.size
    dist.all_gather_object(everybody, found)
    parts = [item.data for item in term.model.model.parameters()]
    parts += [item.ds_tensor for item in term.model.model.parameters() if hasattr(item, "ds_tensor")]
    return {"rewards": everybody, "bytes": sum(part.untyped_storage().nbytes() for part in parts)}


def answer(folder: Path, world: World, kind: str, whole: bool) -> dict[str, Any]:
    """Train a policy large enough to be shared that answers from a copy, where `whole`, or from its shards."""
    policy = digit_model(width=320)
    config = uneven_configuration(
        3,
        budget={"steps": 2},
        critic={},
        batch={"samples": 9, "microBatchRows": 3},
        policy={"innerEpochs": 1, "miniBatchSamples": 9},
        rollout={"maxNewTokens": 8, "batchRows": 4, "wholeCopy": whole},
    )
    with patch.object(samplers, "CopySampler", side_effect=CopySampler) as copies:
        found = run_to_end(context(folder, world), config, policy=with_adapter(policy) if kind == "lora" else policy)
    return found | {"copies": copies.call_count}


def go_back(folder: Path, world: World) -> dict[str, Any]:
    """Train with a guard that only the reference itself passes, with one rollback; return each rank's error and the
    checkpoints."""
    config = ranks_configuration(
        "2-fp32",
        budget={"steps": 9},
        guards={"maxKl": 1e-7, "patience": 2, "action": "rollBack", "maxRollbacks": 1},
        checkpoints={"everySteps": 1, "keepLast": 1},
    )
    here = context(folder, world)
    try:
        run_to_end(here, config)
    except Diverged as error:
        told: list[Any] = [None] * world.size
        dist.all_gather_object(told, str(error))
    home = checkpoints_folder(here.store, here.cache, here.resolved.digest)
    return {"told": told, "checkpoints": [mark.name for mark in complete_checkpoints(home)]}


def interrupt(folder: Path, world: World, config: PpoStage) -> None:
    """Train until the last rank is stopped, in the first round of the second update's answers."""
    here = context(folder, world)
    try:
        run_to_end(here, config, stop_after=6 if world.rank == world.size - 1 else None)
    except Interrupted as error:
        if "after update 1 of 3" not in str(error):
            raise
    else:
        raise RuntimeError("the stop flag was not seen")
