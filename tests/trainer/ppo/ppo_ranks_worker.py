"""One rank of `test_ppo_ranks.py`: trains the toy with each way of sharding and writes what came of it as JSON.

python ppo_ranks_worker.py FOLDER CASE…   with torchrun's variables set; a CASE is ZeRO stage and precision
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ppo_makers import ranks_configuration, run_to_end
from train_makers import context

from stagecoach_api.stages.ppo import PpoStage
from stagecoach_trainer.context import World
from stagecoach_trainer.distributed import process_group, world_from
from stagecoach_trainer.errors import Interrupted


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    world = world_from(os.environ)
    report = {}
    with process_group(world):
        for case in cases:
            interrupt(folder / case / "resumed", world, ranks_configuration(case))
            report[case] = {name: run_to_end(context(folder / case / name, world), ranks_configuration(case))
                            for name in ("whole", "resumed")}  # fmt: skip
    if world.is_main:
        (folder / "report.json").write_text(json.dumps(report))


def interrupt(folder: Path, world: World, config: PpoStage) -> None:
    """Train until the last rank is asked to stop, in the first round of the second update's answers."""
    here = context(folder, world)
    try:
        run_to_end(here, config, stop_after=6 if world.rank == world.size - 1 else None)
    except Interrupted as error:
        if "after update 1 of 3" not in str(error):
            raise
    else:
        raise RuntimeError("the stop flag was not seen")


if __name__ == "__main__":
    main()
