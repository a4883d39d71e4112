"""Makers for tests of whole attempts: a stage file, its environment, and replacements of stage modules.

A `sitecustomize.py` on the worker's path replaces real stage modules; the worker itself is unchanged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import attempt_logs_prefix, parse_rank_log_name
from stagecoach_api.outcomes import AttemptResult
from tests import ROOT
from tests.trainer.contexts import resolved_stage

DIGEST = "d" * 64

DATA_CONFIG: dict[str, Any] = {"sources": [{"uri": "corpus.jsonl"}]}
PRETRAIN_CONFIG: dict[str, Any] = {
    "architecture": {"hiddenSize": 32, "intermediateSize": 64, "numLayers": 2, "numHeads": 4},
    "tokenizer": {"uri": "vocabulary"},
    "data": [{"uri": "corpus.jsonl"}],
    "batch": {"samples": 4, "microBatchRows": 2},
    "optimizer": {"learningRate": 0.01},
    "precision": "fp32",
    "checkpoints": {"everySteps": 2},
}

SITE = """
from stagecoach_trainer import stages
real = stages.module_name
stages.module_name = lambda kind: "stand_in" if kind in ("data", "pretrain") else real(kind)
"""

STRANGERS = """
from contextlib import nullcontext
from stagecoach_trainer.runtime import distributed, startup
distributed.process_group = lambda world, alone: nullcontext()
startup.fast_imports = lambda training: nullcontext()
"""
"""Addition to `SITE`: ranks that do not meet, and import neither torch nor transformers for it."""


@dataclass(frozen=True)
class Attempt:
    """An attempt in a folder of its own, with the code of its stage; of several pods, one of them."""

    folder: Path
    pod: Mapping[str, str] = field(default_factory=dict)
    """Additional variables of a pod's environment."""

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def progress(self) -> Path:
        return self.work / "progress.jsonl"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "STAGECOACH_STAGE_FILE": str(self.work / "stage.json"),
            "STAGECOACH_WORK_DIR": str(self.work),
            "STAGECOACH_CACHE_DIR": str(self.folder / "cache"),
            "STAGECOACH_RESULT_FILE": str(self.work / "result.json"),
            "STAGECOACH_PROGRESS_FILE": str(self.progress),
            "STAGECOACH_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), str(ROOT)]),
            **self.pod,
        }

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the launcher, standard input held open."""
        return subprocess.Popen(
            [sys.executable, "-m", "stagecoach_trainer.launcher", *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=(self.folder / "log.txt").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def run(self) -> int:
        """Run the launcher to its end; return its exit code."""
        with self.start() as launcher:
            return launcher.wait(200)

    @property
    def result(self) -> AttemptResult:
        return AttemptResult.model_validate_json((self.work / "result.json").read_bytes())

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def stored_logs(self) -> dict[int, str]:
        """Return the logs in the attempt's store, by rank."""
        found = {}
        for path in (self.store / attempt_logs_prefix(DIGEST, "0001")).iterdir():
            name = parse_rank_log_name(path.name)
            if name is not None:
                assert name.rank not in found
                found[name.rank] = path.read_text()
        return found


def make_attempt(
    folder: Path,
    code: str,
    kind: str = "data",
    config: dict[str, Any] | None = None,
    ranks: int = 1,
    number: int = 1,
    site: str = SITE,
) -> Attempt:
    """Write the stage file of an attempt. `code`: a module with `run(config, context)`."""
    attempt = Attempt(folder)
    attempt.work.mkdir(parents=True, exist_ok=True)
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(site)
    (folder / "site" / "stand_in.py").write_text(code)
    stage = resolved_stage(
        attempt.store,
        kind=kind,
        attempt=number,
        config=config or {"data": DATA_CONFIG, "pretrain": PRETRAIN_CONFIG}[kind],
        seed=0,
        ranks_per_node=ranks,
    )
    (attempt.work / "stage.json").write_text(json.dumps(stage.model_dump(mode="json")))
    return attempt


def make_pods(folder: Path, code: str, num_nodes: int, port: int) -> list[Attempt]:
    """Write an attempt at a training stage whose pods, of one rank each, are processes of this machine."""
    pods = []
    for index in range(num_nodes):
        attempt = make_attempt(folder / f"pod-{index}", code, "pretrain")
        stage = json.loads((attempt.work / "stage.json").read_text())
        stage |= {"numNodes": num_nodes, "storageUri": str(folder / "pod-0" / "store")}
        (attempt.work / "stage.json").write_text(json.dumps(stage))
        meeting = {"PET_NODE_RANK": str(index), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        pods.append(replace(attempt, pod={"PET_NNODES": str(num_nodes), "PET_NPROC_PER_NODE": "1", **meeting}))
    return pods
