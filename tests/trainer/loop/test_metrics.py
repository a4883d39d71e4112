"""Metrics as written, read back by TensorBoard and as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import LlamaConfig, LlamaForCausalLM

from stagecoach_trainer.loop.metrics import StepFlops, StepMetrics
from stagecoach_trainer.runtime.progress import Progress


def make_flops() -> StepFlops:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return StepFlops(LlamaForCausalLM(config), torch.device("cpu"), 1)


def test_metrics_are_in_tensorboard_and_in_the_json_lines(tmp_path: Path) -> None:
    with StepMetrics(tmp_path, Progress(None), num_steps=300, flops=make_flops()) as meter:
        meter.write(0, {"heldOut.zh.before.loss": 7.5, "heldOut.before.before.loss": 1.0})
        meter.step(1, {"loss": 2.5, "learningRate": 1e-3}, tokens=64, length=16, waited=0.0, padding_share=0.25)
    (events,) = (tmp_path / "tensorboard").iterdir()
    shown = {
        (event.step, value.tag): value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
    }
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # One chart: the value before training is its first point.
    assert shown[0, "heldOut.zh.loss"] == lines[0]["heldOut.zh.before.loss"] == 7.5
    assert shown[0, "heldOut.before.loss"] == 1.0
    assert shown[1, "loss"] == lines[1]["loss"] == 2.5
    assert shown[1, "learningRate"] == pytest.approx(lines[1]["learningRate"])
    assert lines[1]["paddingShare"] == 0.25
    assert lines[1]["dataWaitShare"] == 0.0
    assert lines[1]["tokensPerSecond"] == pytest.approx(64 / lines[1]["seconds"])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with StepMetrics(None, Progress(None), num_steps=1, flops=make_flops()) as meter:
        meter.write(0, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
