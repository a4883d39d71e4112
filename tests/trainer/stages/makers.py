"""Configurations, data files and runs of training stages for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stagecoach_api.kinds.pretrain import PretrainStage
from stagecoach_api.kinds.sft import SftStage
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from tests.trainer.models.makers import SENTENCES, make_context, make_tokenizer, save_base

SMALL: dict[str, Any] = {
    "sequenceLength": 32,
    "budget": {"steps": 6},
    "batch": {"tokens": 128, "microBatchRows": 2},
    "optimizer": {"learningRate": 0.01},
    "precision": "fp32",
}


def report_in(output: Path) -> dict[str, Any]:
    """Return the report of a stage's output folder."""
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def write_texts(path: Path, number: int = 40) -> Path:
    lines = (SENTENCES[index % len(SENTENCES)] + f" {index}" for index in range(number))
    path.write_text("".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines))
    return path


def write_talks(path: Path, number: int = 40) -> Path:
    records = [
        {
            "instruction": f"what is {index}",
            "input": "the fox" if index % 3 == 0 else "",
            "output": f"the dog {index % 5}",
        }
        for index in range(number)
    ]
    path.write_text(json.dumps(records))
    return path


class Workshop:
    """A folder with a base model, data, and the artifacts of the stages that ran in it."""

    def __init__(self, root: Path, tied: bool = False) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        save_base(root / "base", make_tokenizer(), seed=1, tied=tied)
        make_tokenizer(extra=("龘", "靐")).save_pretrained(root / "larger")
        self.inputs = {
            "base": root / "base",
            "larger": root / "larger",
            "texts": write_texts(root / "texts.jsonl"),
            "talks": write_talks(root / "talks.json"),
        }

    def context(self, kind: str, name: str, **changes: Any) -> StageContext:
        return make_context(self.root / name, kind, self.inputs, **changes)

    def pretrain(self, name: str = "pretrain", **changes: Any) -> tuple[StageOutcome, Path]:
        """Run a `pretrain` stage; its output becomes the input `name`."""
        from stagecoach_trainer.stages.pretrain import run

        values = {"model": {"uri": "base"}, "data": [{"uri": "texts"}], **SMALL, **changes}
        config = PretrainStage.model_validate({key: value for key, value in values.items() if value is not None})
        context = self.context("pretrain", name)
        outcome = run(config, context)
        self.inputs[name] = context.output
        return outcome, context.output

    def sft(self, name: str = "sft", **changes: Any) -> tuple[StageOutcome, Path]:
        """Run an `sft` stage; its output becomes the input `name`."""
        from stagecoach_trainer.stages.sft import run

        values = {
            "model": {"uri": "base"},
            "data": [{"uri": "talks", "format": "alpaca"}],
            "template": {"name": "alpaca"},
            **SMALL,
            "sequenceLength": 160,
            "batch": {"tokens": 640},
            **changes,
        }
        config = SftStage.model_validate({key: value for key, value in values.items() if value is not None})
        context = self.context("sft", name)
        outcome = run(config, context)
        self.inputs[name] = context.output
        return outcome, context.output
