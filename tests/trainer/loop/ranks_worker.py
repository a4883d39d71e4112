"""The cases of `test_ranks.py`: the tiny model trained with each way of sharding.

A case is ZeRO stage and precision, such as 2-fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagecoach_api.training import MeasuredTraining, Sharding
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import Interrupted
from tests.trainer.loop.makers import RandomPlan, WatchedSchedule, context, tiny_model, training

NUM_ROWS = 5
"""Odd: one of two ranks has a row less."""


def report(folder: Path, cases: Sequence[str], world: World) -> dict[str, Any]:
    """Return the losses and weights of each case, undisturbed and resumed."""
    results = {}
    for case in cases:
        config = configuration(case)
        interrupt(folder / case / "resumed", world, config)
        results[case] = {name: run(folder / case / name, world, config) for name in ("whole", "resumed")}
    return results


def configuration(case: str) -> MeasuredTraining:
    stage, precision = case.split("-")
    return training(
        precision=precision,
        sharding=Sharding(zero=int(stage)),
        checkpoints={"every_steps": 2},
        attention_dropout=0.1 if precision == "bf16" else 0.0,
    )


def interrupt(folder: Path, world: World, config: MeasuredTraining) -> None:
    """Train until the last rank is asked to stop in step 4."""
    here = context(folder, world)

    def stop_in_step_4(step: int) -> None:
        if step == 3 and world.rank == world.size - 1:
            here.stop.set()

    schedule = WatchedSchedule(on_step=stop_in_step_4)
    try:
        train(TrainingJob(tiny_model(), config, RandomPlan(num_rows=NUM_ROWS), schedule=schedule), here)
    except Interrupted as error:
        if "after step 4 of 6" not in str(error):
            raise
    else:
        raise RuntimeError("the stop flag was not seen")


def run(folder: Path, world: World, config: MeasuredTraining) -> dict[str, Any]:
    """Train to the end; return the losses and the bytes of the final weights."""
    model = tiny_model()
    result = train(TrainingJob(model, config, RandomPlan(num_rows=NUM_ROWS)), context(folder, world))
    named = model.named_parameters() if world.is_main else ()  # the others' weights are of no use any more
    weights = {name: item.detach().numpy().tobytes().hex() for name, item in named}
    return {"losses": [point["loss"] for point in result.history], "weights": weights}
