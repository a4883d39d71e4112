"""The cases of `test_reward_model_ranks.py`: a `rewardModel` stage with each ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stagecoach_api.kinds.reward_model import RewardModelStage
from stagecoach_api.references import Reference
from stagecoach_trainer.models.reward import load_reward_model
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.stages.reward_model import run
from tests.trainer.align.makers import LEARNS, rewards_of
from tests.trainer.models.makers import make_context, report_of

CONFIG: dict[str, Any] = LEARNS | {
    "sequenceLength": 64,
    "batch": {"samples": 3, "microBatchRows": 2},
    "budget": {"epochs": 1},
    "loss": {"ranked": {}},
}
"""Seven prompts in steps of three: in the last step one of two ranks has nothing to do."""

ASKED = [(({"role": "user", "content": "a quick dog"},), answer) for answer in ("the dog sleeps", "a fox jumps", "no")]


def result_of(folder: Path, name: str, world: World, zero: int = 0) -> dict[str, float]:
    """Run the stage on the inputs in `folder`; return its metrics and, on rank 0, the artifact's rewards."""
    inputs = {item: folder / item for item in ("base", "train", "test")}
    context = make_context(folder / name / str(world.rank), "rewardModel", inputs, world=world)
    found = dict(run(RewardModelStage.model_validate(CONFIG | {"sharding": {"zero": zero}}), context).metrics)
    if world.is_main:
        reading = make_context(folder / name / "reading", "ppo", {"base": folder / "base", "reward": context.output})
        reward = load_reward_model(reading, Reference(uri="reward"), torch.float32, torch.device("cpu"))
        found |= {f"reward.{index}": value for index, value in enumerate(rewards_of(reward, ASKED, 3))}
        found["bias"] = report_of(context)["bias"]
    return found


def report(folder: Path, cases: Sequence[str], world: World) -> dict[str, Any]:
    """Return the results by ZeRO stage."""
    return {stage: result_of(folder, f"zero{stage}", world, int(stage)) for stage in cases}
