"""Makers for the end-to-end tests: a folder with a very small pipeline of every kind of stage, and the processes of the
real command line and the real trainer that run it. torch is not imported here."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from stagecoach_api.artifacts import Manifest, checkpoints_prefix, manifest_key
from stagecoach_local.workspace import RunRecord, Workspace

NARROW = (sys.executable, "-S", str(Path(__file__).parent / "narrow.py"))
COMMAND = (sys.executable, "-m", "stagecoach_cli")
FILE = "run.yaml"
NAME = "tiny"
STEPS = 240
TIMEOUT_SECONDS = 600

WORDS = ("the", "a", "fox", "dog", "brown", "quick", "lazy", "word", "model", "reads", "next", "under", "tree", "moon")
VERSES = ("白日依山盡", "黃河入海流", "欲窮千里目", "更上一層樓", "床前明月光", "疑是地上霜", "舉頭望明月")


def english(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=12)) + f" {index}." for index in range(number)]


def chinese(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["，".join(draw.choices(VERSES, k=4)) + f"。{index}" for index in range(number)]


def conversations(number: int) -> list[dict[str, str]]:
    return [{"instruction": f"幾個字 {index}？", "output": "五" if index % 2 else "七"} for index in range(number)]


def data_stage(name: str, uri: str, **config: Any) -> dict[str, Any]:
    source = {"uri": uri, **config.pop("source", {})}
    return {"name": name, "data": {"sources": [source], **config}}


def training(steps: int, every: int) -> dict[str, Any]:
    return {
        "sequenceLength": 64,
        "batch": {"tokens": 128, "microBatchRows": 1},
        "budget": {"steps": steps},
        "optimizer": {"learningRate": 0.003},
        "checkpoints": {"everySteps": every},
    }


def pipeline() -> list[dict[str, Any]]:
    """Return the stages: two corpora, a vocabulary and its extension, a model, its tuning, evaluation and release."""
    held_out = [{"name": name, "stage": name, "split": "heldout"} for name in ("zh", "en")]
    lora = {"lora": {"rank": 4, "alpha": 8, "newRows": True}}
    return [
        data_stage("en", "data/english.jsonl", heldOutShare=0.1),
        data_stage("zh", "data/chinese.jsonl", heldOutShare=0.1),
        {"name": "words", "tokenizer": {"train": {"data": [{"stage": "en"}], "vocabSize": 300}}},
        {
            "name": "base",
            "pretrain": {
                "architecture": {"hiddenSize": 32, "intermediateSize": 64, "numLayers": 2, "numHeads": 2},
                "tokenizer": {"stage": "words"},
                "data": [{"stage": "en"}, {"stage": "zh"}],
                "heldOut": {"sets": held_out, "maxTokens": 512},
                **training(STEPS, 10),
            },
        },
        {
            "name": "vocabulary",
            "tokenizer": {
                "base": {"stage": "words"},
                "train": {"data": [{"stage": "zh"}], "vocabSize": 310},
                "merge": {"characters": "cjk"},
                "measureOn": held_out,
            },
        },
        {
            "name": "tune",
            "sft": {
                "model": {"stage": "base"},
                "tokenizer": {"stage": "vocabulary"},
                "data": [{"uri": "data/instructions.json", "format": "alpaca"}],
                "template": {"name": "humanBot"},
                "trainable": lora,
                **training(12, 4),
            },
        },
        {
            "name": "score",
            "evaluate": {
                "model": {"stage": "tune"},
                "heldOut": held_out,
                "maxTokens": 256,
                "sequenceLength": 64,
                "exactMatch": [
                    {
                        "name": "count",
                        "data": {"name": "count", "uri": "data/instructions.json", "format": "alpaca"},
                        "maxSamples": 4,
                        "generation": {"maxNewTokens": 2},
                    }
                ],
                "gates": [{"metric": "count.exactMatch", "atLeast": 0.0}],
            },
        },
        {
            "name": "release",
            "export": {
                "model": {"stage": "tune"},
                "samples": {"prompts": ["幾個字 1？"], "generation": {"maxNewTokens": 4}},
            },
        },
    ]


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a command."""

    code: int
    output: str

    @property
    def unwrapped(self) -> str:
        """The output with every run of white space replaced by one space."""
        return " ".join(self.output.split())


@dataclass(frozen=True)
class Bench:
    """A folder with a run, and the command line that runs it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    file_bytes: int | None = None
    """Largest possible size of a file, as on a full disk; None for no limit."""
    core: int | None = None
    """The only core to run on, as on a machine with one core; None for all cores that this process may use."""

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / ".stagecoach")

    def write(self, stages: list[dict[str, Any]], **spec: Any) -> None:
        """Write the run file."""
        run = {
            "apiVersion": "stagecoach.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": NAME},
            "spec": {"seed": 3, **spec, "stages": stages},
        }
        (self.folder / FILE).write_text(json.dumps(run, ensure_ascii=False), encoding="utf-8")  # JSON is YAML

    def write_data(self) -> None:
        """Write the pipeline's inputs."""
        self.write_jsonl("english.jsonl", [{"text": text} for text in english(120)])
        self.write_jsonl("chinese.jsonl", [{"text": text} for text in chinese(80)])
        self.write_file("instructions.json", json.dumps(conversations(64), ensure_ascii=False).encode())

    def write_jsonl(self, name: str, values: list[Any]) -> Path:
        lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        return self.write_file(name, lines.encode())

    def write_file(self, name: str, data: bytes) -> Path:
        path = self.folder / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    # -- commands ------------------------------------------------------------------------------------------------------

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line in its own session."""
        return subprocess.Popen(
            [*NARROW, *self._limits(), *COMMAND, *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _limits(self) -> list[str]:
        return ["-" if value is None else str(value) for value in (self.core, self.file_bytes)]

    def call(self, *arguments: str) -> Ended:
        """Run the command line to its end; fail if it shows a traceback."""
        ended = finish(self.start(*arguments))
        assert "Traceback (most recent call last)" not in ended.output, ended.output
        return ended

    def run(self, *arguments: str) -> Ended:
        return self.call("run", FILE, *arguments)

    # -- results -------------------------------------------------------------------------------------------------------

    def record(self, run: str = NAME) -> RunRecord:
        record = self.workspace.run("default", run).load()
        assert record is not None
        return record

    def attempts(self, stage: str | None = None) -> int:
        """Return the number of attempts of one stage or of the whole run."""
        return sum(1 for attempt in self.record().attempts if stage in (None, attempt.stage))

    def content(self, run: str = NAME) -> dict[str, str | None]:
        """Return every stage's content digest."""
        return {name: stage.content_digest for name, stage in self.record(run).stages.items()}

    def digest(self, stage: str) -> str:
        digest = self.record().stages[stage].digest
        assert digest is not None
        return digest

    def manifest(self, stage: str) -> Manifest:
        """Return the manifest of a stage whose artifact is in the workspace's store."""
        path = self.workspace.default_storage / manifest_key(self.digest(stage))
        return Manifest.model_validate_json(path.read_bytes())

    def message(self, stage: str) -> str:
        return self.record().stages[stage].message

    def checkpoints(self, stage: str) -> list[Path]:
        """Return the complete checkpoints of a stage in the workspace's store, oldest first."""
        folder = self.workspace.default_storage / checkpoints_prefix(self.digest(stage))
        return sorted(path.parent for path in folder.glob("step-*/manifest.json"))

    def worker(self, stage: str, attempt: int) -> psutil.Process:
        """Return the training process, not its launcher."""
        folder = self.workspace.run("default", NAME).attempt(stage, attempt).path
        return psutil.Process(int((folder / "outcomes" / "rank-00000.pid").read_text()))


def finish(process: subprocess.Popen[str], seconds: float = TIMEOUT_SECONDS) -> Ended:
    """Wait until a command ends; on timeout, kill it and fail."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds:.0f} s: {process.communicate()[0]}") from None
    return Ended(process.returncode, output)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Wait until `condition` is true and return its value. Errors such as missing files count as false."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            value = condition()
        except (OSError, ValueError, KeyError, AssertionError, psutil.Error):
            value = None
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what}: not after {seconds:.0f} s")
