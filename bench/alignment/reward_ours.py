"""Our side of the reward-model bench: the training loop with the objective of `rewardModel` stages.

`python -m bench.alignment.reward_ours TASK` prints seconds and loss of every step as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.alignment import preference_task as task
from bench.ours import NEVER, OPTIMIZER, resolve
from bench.workload import ClockedSchedule, GivenPlan
from stagecoach_api.kinds.reward_model import RewardModelStage
from stagecoach_trainer.samples.groups import Counting, Group, TokenSequence


def configuration() -> RewardModelStage:
    """Return the task as a stage's configuration."""
    return RewardModelStage.model_validate(
        {
            "model": {"uri": "unused"},
            "data": [{"uri": "unused"}],
            "loss": {"pair": {}},
            "sequenceLength": task.LONGEST,
            "budget": {"steps": task.STEPS},
            "batch": {"samples": task.PAIRS, "microBatchRows": task.PAIRS},
            "optimizer": OPTIMIZER | {"learningRate": task.LEARNING_RATE},
            "schedule": {"name": "constant"},
            "precision": "bf16",
            "checkpoints": {"everySteps": NEVER},
        }
    )


def group_of(pair: task.Pair, place: int) -> Group:
    """Return a pair as the stage's planner yields it."""
    sequences = tuple(TokenSequence(np.array(ids, np.int32), 1) for ids in pair)
    return Group(sequences, np.array([0]), np.array([1]), None, 0, (0, place), Counting.PAIRS)


def main() -> None:
    """Train and print the measurements."""
    import torch
    from transformers import LlamaForSequenceClassification

    from stagecoach_trainer.align.reward_objective import RewardObjective
    from stagecoach_trainer.loop.job import TrainingJob
    from stagecoach_trainer.loop.loop import train
    from stagecoach_trainer.run_stage import AttemptSettings, build_context
    from stagecoach_trainer.runtime.context import World
    from stagecoach_trainer.runtime.startup import postpone_garbage_collection

    task_folder, config = Path(sys.argv[1]), configuration()
    model: Any = LlamaForSequenceClassification.from_pretrained(task_folder / "model", dtype=torch.float32)
    steps = [[group_of(pair, place) for place, pair in enumerate(step)] for step in task.read_steps(task_folder)]
    plan = GivenPlan(steps)
    schedule = ClockedSchedule.of(config, task.STEPS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = resolve("rewardModel", config.model_dump(mode="json"), [], folder)
        attempt = AttemptSettings(stage, config, folder / "work", folder / "cache", None, World(), time.time())
        job = TrainingJob(model, config, plan, objective=RewardObjective(config.loss), schedule=schedule)
        postpone_garbage_collection()  # as the entry point of a worker does
        result = train(job, build_context(attempt, threading.Event()))
    begun = [schedule.begun[step] for step in range(task.STEPS)]
    losses = [float(point["loss"]) for point in result.history]
    print(json.dumps({"seconds": np.diff(begun)[1:].tolist(), "losses": losses}))


if __name__ == "__main__":
    main()
