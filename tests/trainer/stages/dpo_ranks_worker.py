"""The cases of `test_dpo_ranks.py`: a `dpo` stage with each ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagecoach_api.kinds.dpo import DpoStage
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.stages.dpo import run
from tests.trainer.align.makers import LEARNS
from tests.trainer.models.makers import make_context

CONFIG: dict[str, Any] = LEARNS | {
    "reference": {"uri": "other"},
    "sequenceLength": 64,
    "batch": {"samples": 3},
    "budget": {"epochs": 1},
    "loss": {"kto": {"beta": 0.5}},
}
"""Seven answers in steps of three: in the last step one of two ranks has nothing to do."""


def metrics_of(folder: Path, name: str, world: World, zero: int = 0) -> dict[str, float]:
    """Run the stage on the inputs in `folder`."""
    inputs = {item: folder / item for item in ("base", "other", "train", "test")}
    context = make_context(folder / name / str(world.rank), "dpo", inputs, world=world)
    return dict(run(DpoStage.model_validate(CONFIG | {"sharding": {"zero": zero}}), context).metrics)


def report(folder: Path, cases: Sequence[str], world: World) -> dict[str, Any]:
    """Return the metrics by ZeRO stage."""
    return {stage: metrics_of(folder, f"zero{stage}", world, int(stage)) for stage in cases}
