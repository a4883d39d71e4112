"""Our side: the training loop, called as the stages call it, and whole stages as processes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM

from bench.measuring import Child, num_threads, run_child
from bench.workload import LEARNING_RATE, TOKENS, ClockedSchedule, GivenPlan, Run
from stagecoach_api.artifacts import ResolvedInput, ResolvedStage, digest_of
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.kinds.pretrain import PretrainStage
from stagecoach_api.names import (
    ENV_CACHE_DIR,
    ENV_PROGRESS_FILE,
    ENV_RESULT_FILE,
    ENV_STAGE_FILE,
    ENV_THREADS,
    ENV_WORK_DIR,
)
from stagecoach_api.references import Reference
from stagecoach_api.store import external_digest, list_external, open_store
from stagecoach_api.stores.lookup import read_manifest
from stagecoach_trainer.batches.rows import Row

NEVER = 10**9
OPTIMIZER = {"learningRate": LEARNING_RATE, "beta2": 0.95, "weightDecay": 0.0, "clip": 1.0}


def train_ours(
    model: LlamaForCausalLM,
    batches: Sequence[Sequence[Row]],
    folder: Path,
    bf16: bool,
    micro_batch: int,
    longest: int = TOKENS,
) -> Run:
    """Train on `batches` (the rows of every step), `micro_batch` rows at a time; return times and losses.

    `folder` must be new: the loop resumes from any checkpoint it finds.
    """
    from stagecoach_trainer.loop.job import TrainingJob
    from stagecoach_trainer.loop.loop import train
    from stagecoach_trainer.run_stage import AttemptSettings, build_context
    from stagecoach_trainer.runtime.context import World
    from stagecoach_trainer.runtime.startup import postpone_garbage_collection

    config = PretrainStage.model_validate(
        {
            "model": {"uri": "unused"},
            "data": [{"uri": "unused"}],
            "sequenceLength": longest,
            "budget": {"steps": len(batches)},
            "batch": {"tokens": longest * len(batches[0]), "microBatchRows": micro_batch},
            "optimizer": OPTIMIZER,
            "schedule": {"name": "constant"},
            "precision": "bf16" if bf16 else "fp32",
            "checkpoints": {"everySteps": NEVER},
        }
    )
    stage = resolve("pretrain", config.model_dump(mode="json"), [], folder)
    attempt = AttemptSettings(stage, config, folder / "work", folder / "cache", None, World(), time.time())
    schedule = ClockedSchedule.of(config, len(batches))
    job = TrainingJob(model, config, GivenPlan(batches), schedule=schedule)
    postpone_garbage_collection()  # as the entry point of a worker does
    result = train(job, build_context(attempt, threading.Event()))
    begun = [schedule.begun[step] for step in range(len(batches))]
    return Run(np.diff(begun)[1:].tolist(), [float(point["loss"]) for point in result.history])


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics that `train_ours` has logged in `folder`."""
    return [json.loads(line) for line in (folder / "work" / "logs" / "metrics.jsonl").read_text().splitlines()]


# -- whole stages ------------------------------------------------------------------------------------------------------


def resolve(kind: str, config: Mapping[str, Any], uris: Sequence[Path], folder: Path) -> ResolvedStage:
    """Return the resolved stage that a driver would write to `stage.json`; its inputs are the local paths `uris`."""
    inputs = {}
    for path in uris:
        reference = Reference(uri=str(path))
        digest = external_digest(list_external(str(path))[1])
        inputs[reference.key] = ResolvedInput(uri=str(path), digest=digest)
    return ResolvedStage(
        namespace="default",
        run="bench",
        stage=kind,
        kind=kind,
        attempt=1,
        digest=digest_of([kind, dict(config), str(folder)]),
        config=dict(config),
        inputs=inputs,
        seed=0,
        code="bench",
        storage_uri=str(folder / "store"),
    )


def run_stage_process(stage: ResolvedStage, folder: Path) -> tuple[Child, list[dict[str, Any]]]:
    """Run a stage through the launcher, as a driver does; return the process and its progress events."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").write_text(stage.model_dump_json(), encoding="utf-8")
    environment = {
        ENV_STAGE_FILE: str(folder / "stage.json"),
        ENV_WORK_DIR: str(folder / "work"),
        ENV_CACHE_DIR: str(folder / "cache"),
        ENV_RESULT_FILE: str(folder / "result.json"),
        ENV_PROGRESS_FILE: str(folder / "progress.jsonl"),
        ENV_THREADS: str(num_threads()),
    }
    (folder / "work").mkdir(exist_ok=True)
    child = run_child(["-m", "stagecoach_trainer.launcher"], environment)
    lines = (folder / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    return child, [json.loads(line) for line in lines]


def output_of(stage: ResolvedStage) -> Path:
    """Return the folder of a stage's output."""
    return Path(stage.storage_uri) / read_manifest(open_store(stage.storage_uri), stage.digest).folder


def full_config(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's configuration with every default filled in."""
    filled: dict[str, Any] = STAGE_KINDS[kind].config.model_validate(config).model_dump(mode="json")
    return filled
