"""The cases of `test_ppo_shared_base.py`: a `ppo` stage under LoRA with each ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.stages.ppo import run
from tests.trainer.models.makers import make_context, report_of
from tests.trainer.ppo.makers import adapter_stage


def history_of(folder: Path, world: World, zero: int) -> list[dict[str, Any]]:
    """Run the stage on the inputs in `folder`: three answers an update, of which the second rank has one."""
    inputs = {item: folder / item for item in ("base", "prompts", "reward")}
    context = make_context(folder / f"zero{zero}" / str(world.rank), "ppo", inputs, world=world)
    run(adapter_stage(sharding={"zero": zero}, batch={"samples": 3, "microBatchRows": 1}), context)
    found: list[dict[str, Any]] = report_of(context)["history"] if world.is_main else []
    return found


def report(folder: Path, cases: Sequence[str], world: World) -> dict[str, Any]:
    """Return the history by ZeRO stage."""
    return {stage: history_of(folder, world, int(stage)) for stage in cases}
