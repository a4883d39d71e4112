"""One rank of `test_ppo_shared_base.py`: runs a `ppo` stage under LoRA with each way of sharding and writes its
history as JSON.

python ppo_adapter_ranks_worker.py FOLDER STAGE…   with torchrun's variables set; a STAGE is a ZeRO stage
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.distributed import process_group, world_from
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


def main() -> None:
    folder, stages = Path(sys.argv[1]), sys.argv[2:]
    world = world_from(os.environ)
    with process_group(world):
        report = {stage: history_of(folder, world, int(stage)) for stage in stages}
    if world.is_main:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
