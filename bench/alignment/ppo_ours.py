"""Our side of the PPO bench: the loop of `ppo` stages, called as the stage calls it.

`python -m bench.alignment.ppo_ours TASK SEED PRECISION UPDATES` prints reward, KL and seconds of every update as one
line of JSON.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.alignment import ppo_task as task
from bench.llama import VOCABULARY
from bench.ours import NEVER, resolve
from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_trainer.batches.mixing import Mix, Stream
from stagecoach_trainer.ppo.job import PpoJob
from stagecoach_trainer.ppo.prompt_plan import PromptPlan
from stagecoach_trainer.rewards.term import Completion, Score
from stagecoach_trainer.rewards.total import RewardSum
from stagecoach_trainer.samples.prompts import Prompt


@dataclass(frozen=True)
class ClockedPrompts(PromptPlan):
    """Records when each update begins."""

    begun: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)

    def prompts(self, update: int) -> list[Prompt]:
        self.begun.append(time.perf_counter())
        self.worked.append(time.process_time())
        return super().prompts(update)


class IdTokenizer:
    """A tokenizer that writes token ids as decimal numbers."""

    eos_token_id = None

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(VOCABULARY + 1)}

    def decode(self, ids: Sequence[int], **settings: Any) -> str:
        return " ".join(map(str, ids))


class ModelReward(RewardSum):
    """The reward model's value for prompt and answer, both written as token ids."""

    def __init__(self, model: Any) -> None:
        super().__init__([])
        self.model = model

    @property
    def names(self) -> tuple[str, ...]:
        return ("model",)

    def score(self, batch: Sequence[Completion]) -> list[Score]:
        rows = [_ids(f"{judged.prompt[-1]['content']} {judged.answer}") for judged in batch]
        return [Score(value, {"model": value}) for value in self.model.score_ids(rows, task.SAMPLES)]


def configuration(precision: str, updates: int) -> PpoStage:
    """Return the task as a stage's configuration, without the guards that could end it early."""
    optimizer = {"learningRate": task.LEARNING_RATE, "beta2": 0.999, "weightDecay": 0.0, "clip": None}
    return PpoStage.model_validate(
        {
            "model": {"uri": "unused"},
            "data": [{"uri": "unused.jsonl"}],
            "rewards": [{"name": "model", "model": {"uri": "unused"}}],
            "sequenceLength": task.LONGEST + task.ANSWER,
            "batch": {"samples": task.SAMPLES, "microBatchRows": task.SAMPLES // task.MINI_BATCHES},
            "budget": {"steps": updates},
            "optimizer": optimizer,
            "schedule": {"name": "constant"},
            "precision": precision,
            "rollout": {"maxNewTokens": task.ANSWER, "batchRows": task.SAMPLES},
            "policy": {
                "innerEpochs": task.EPOCHS,
                "miniBatchSamples": task.SAMPLES // task.MINI_BATCHES,
                "clip": task.CLIP,
                "gamma": task.GAMMA,
                "gaeLambda": task.LAMBDA,
            },
            "critic": {"clip": task.CLIP},
            "kl": {"coefficient": task.KL},
            "guards": {"minEndedShare": None, "minKl": None},
            "checkpoints": {"everySteps": NEVER},
        }
    )


def make_job(folder: Path, precision: str, updates: int) -> PpoJob:
    """Return the task as a PPO stage, ready to start."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    from stagecoach_trainer.loop.loop import training_device
    from stagecoach_trainer.models.placement import place
    from stagecoach_trainer.models.reward import RewardModel
    from stagecoach_trainer.runtime.context import World

    config = configuration(precision, updates)
    policy: Any = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    critic: Any = LlamaForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    reward = place(copy.deepcopy(critic), dtype, training_device(World()))
    return PpoJob(
        config=config,
        policy=policy,
        critic=critic,
        reference=copy.deepcopy(policy),
        tokenizer=IdTokenizer(),
        rewards=ModelReward(RewardModel(reward, None)),
        prompts=make_plan(folder, updates),
        text=None,
    )


def make_plan(folder: Path, updates: int) -> ClockedPrompts:
    """Return a plan in which each of the task's prompts is answered once."""
    found = tuple(_prompt(ids) for ids in json.loads((folder / "prompts.json").read_text()))
    mix = Mix([Stream(len(found), 5)], [1.0], task.SAMPLES * updates, 6, [0])
    return ClockedPrompts((found,), mix, task.SAMPLES, updates)


def _prompt(ids: Sequence[int]) -> Prompt:
    return Prompt(np.array(ids, np.int32), ({"role": "user", "content": " ".join(map(str, ids))},), (), "prompts.json")


def _ids(text: str) -> np.ndarray:
    return np.array(text.split(), np.int32)


def main() -> None:
    """Train and print the measurements."""
    from stagecoach_trainer.ppo.loop import train_policy
    from stagecoach_trainer.run_stage import AttemptSettings, build_context
    from stagecoach_trainer.runtime.context import World
    from stagecoach_trainer.runtime.startup import postpone_garbage_collection

    task_folder, seed, precision = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    job = make_job(task_folder, precision, int(sys.argv[4]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = resolve("ppo", job.config.model_dump(mode="json"), [], folder)
        stage = stage.model_copy(update={"seed": seed})
        attempt = AttemptSettings(stage, job.config, folder / "work", folder / "cache", None, World(), time.time())
        postpone_garbage_collection()  # as the entry point of a worker does
        result = train_policy(job, build_context(attempt, threading.Event()))
    plan: Any = job.prompts
    begun, worked = [*plan.begun, time.perf_counter()], [*plan.worked, time.process_time()]
    points = [point for point in result.history if "reward" in point]
    found = {"rewards": [point["reward"] for point in points], "kl": [point["kl"] for point in points]}
    print(json.dumps(found | {"seconds": task.gaps(begun[1:]), "cpuSeconds": task.gaps(worked[1:])}))


if __name__ == "__main__":
    main()
