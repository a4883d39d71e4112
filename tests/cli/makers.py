"""Makers for the tests of the command line: a small run, a script for the fake trainer, a driver that uses both."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stagecoach_core.policies.selection import starting_from, until
from stagecoach_core.snapshot import Snapshot
from stagecoach_local.driver import Driver, Outcome
from stagecoach_local.machine import Machine
from stagecoach_local.prepare import PreparedRun, prepare
from stagecoach_local.run_job import Job
from stagecoach_local.workspace import RunRecord, Workspace

Cli = Callable[..., tuple[int, str]]
"""The command line as a function from arguments to exit code and output."""

DRIVE = Path(__file__).parent / "drive.py"
FAKE_LAUNCHER = Path(__file__).parent / "fake_launcher.py"
FILE = "run.yaml"
NAME = "tiny"

ARCHITECTURE = {"hiddenSize": 32, "intermediateSize": 64, "numLayers": 2, "numHeads": 2}
TRAINING = {"sequenceLength": 16, "batch": {"tokens": 64}, "optimizer": {"learningRate": 0.001}}


def data_stage(name: str) -> dict[str, Any]:
    return {"name": name, "data": {"sources": [{"uri": f"data/{name}.txt", "format": "text"}], "heldOutShare": 0.5}}


def pretrain_stage(name: str, tokenizer: str, data: str) -> dict[str, Any]:
    config = {
        "architecture": ARCHITECTURE,
        "tokenizer": {"stage": tokenizer},
        "data": [{"stage": data}],
        "budget": {"tokens": 6400},
        **TRAINING,
    }
    return {"name": name, "pretrain": config}


def tokenizer_stage(name: str, data: str) -> dict[str, Any]:
    return {"name": name, "tokenizer": {"train": {"data": [{"stage": data}], "vocabSize": 300}}}


def export_stage(name: str, model: str) -> dict[str, Any]:
    return {"name": name, "export": {"model": {"stage": model}}}


def evaluate_stage(name: str, model: str, data: str) -> dict[str, Any]:
    held_out = [{"name": "zh", "stage": data, "split": "heldout"}]
    return {"name": name, "evaluate": {"model": {"stage": model}, "heldOut": held_out}}


def chain() -> list[dict[str, Any]]:
    """Two data sets, a vocabulary of the first, a model, its evaluation and its export."""
    return [
        data_stage("corpus"),
        data_stage("held"),
        tokenizer_stage("vocabulary", "corpus"),
        pretrain_stage("base", "vocabulary", "corpus"),
        evaluate_stage("score", "base", "held"),
        export_stage("release", "base"),
    ]


@dataclass
class Recorder:
    """A view that records what it was shown."""

    snapshots: list[Snapshot] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def show(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def notify(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Bench:
    """A folder with a run file, its data, and a script for the fake trainer."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / FILE

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / ".stagecoach")

    def write(self, stages: list[dict[str, Any]], script: dict[str, Any] | None = None, **spec: Any) -> None:
        """Write the run file, the data it names, and the script."""
        run = {
            "apiVersion": "stagecoach.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": NAME},
            "spec": {**spec, "stages": stages},
        }
        self.file.write_text(json.dumps(run), encoding="utf-8")  # JSON is YAML
        for stage in stages:
            if "data" in stage:
                path = self.folder / "data" / f"{stage['name']}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"text of {stage['name']}\n", encoding="utf-8")
        self.follow(script or {})

    def follow(self, script: dict[str, Any]) -> None:
        """Write the fake trainer's script; a stage's entry is for all attempts, or a list with one for each."""
        lists = {name: entry if isinstance(entry, list) else [entry] for name, entry in script.items()}
        (self.folder / "script.json").write_text(json.dumps(lists), encoding="utf-8")
        (self.folder / "events.jsonl").touch()

    def prepare(self, *overrides: str) -> PreparedRun:
        self.workspace.prepare()
        return prepare(self.file, self.workspace, overrides)

    def job(self, *overrides: str, **changes: Any) -> Job:
        """Return a job for the fake trainer on a machine of two cores; `until` and `start` name stages."""
        prepared = self.prepare(*overrides)
        plan = prepared.plan
        if "until" in changes:
            changes["selected"] = until(plan, changes.pop("until"))
        if "start" in changes:
            changes["forced"] = starting_from(plan, changes.pop("start"))
        job = Job(
            plan=plan,
            file=self.file,
            workspace=self.workspace,
            store=prepared.store,
            machine=Machine(cores=2),
            launcher=(sys.executable, "-S", str(FAKE_LAUNCHER), str(self.folder)),
            poll_seconds=0.02,
            grace_seconds=5.0,
        )
        return replace(job, **changes)

    def drive(self, *overrides: str, **changes: Any) -> Outcome:
        job = self.job(*overrides, **changes)
        return Driver(job, Recorder()).run()

    def stagecoach(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the real command line with the fake trainer in a process of its own."""
        return subprocess.Popen(
            [sys.executable, str(DRIVE), *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_event(self, kind: str, seconds: float = 30.0) -> dict[str, Any]:
        """Wait for the first event of a kind and return it."""
        deadline = time.monotonic() + seconds
        while not self.events(kind):
            assert time.monotonic() < deadline, f"no `{kind}` after {seconds:.0f} s"
            time.sleep(0.02)
        return self.events(kind)[0]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if not kinds or event["event"] in kinds]

    def started(self) -> list[str]:
        """Return the stages in the order in which attempts started."""
        return [event["stage"] for event in self.events("start")]

    def record(self) -> RunRecord:
        record = self.workspace.run("default", NAME).load()
        assert record is not None
        return record
