"""What the loop rejects, measures and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagecoach_api.training import EarlyStop
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.batches.schedule import PhaseSchedule, StepSchedule
from stagecoach_trainer.kernels.causal import set_rope_theta
from stagecoach_trainer.loop.job import HeldOutSet, TrainingJob
from stagecoach_trainer.loop.loop import train
from stagecoach_trainer.loop.measure import measure
from stagecoach_trainer.runtime.errors import Diverged, UserError
from tests.trainer.loop.makers import RandomPlan, context, equal_weights, row, tiny_model, training, weights


class Explosive(StepSchedule):
    """A learning rate that makes the loss NaN."""

    def learning_rate(self, step: int) -> float:
        return 1e30 if step == 2 else 1e-3


@dataclass(frozen=True)
class Silent(RandomPlan):
    """A batch without loss in step index 1."""

    def rows(self, step: int) -> list[Row]:
        share = 1.0 if step == 1 else 0.0
        return [row((8, 8), 10 * step + index, share) for index in range(2)]


def test_a_nan_loss_names_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = training(checkpoints={"every_steps": 2})
    job = TrainingJob(tiny_model(), config, RandomPlan(), schedule=Explosive.of(config, 6))
    with pytest.raises(Diverged, match=r"at step 4; the last good checkpoint is that of step 2\. Lower"):
        train(job, context(tmp_path))


def test_a_batch_without_any_loss_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 2: no position of the batch has loss"):
        train(TrainingJob(tiny_model(), training(), Silent()), context(tmp_path))


def test_an_error_while_rows_are_made_is_raised_unchanged(tmp_path: Path) -> None:
    class Faulty(RandomPlan):
        def rows(self, step: int) -> list[Row]:
            if step == 2:
                raise UserError("shard 3 is gone")
            return super().rows(step)

    with pytest.raises(UserError, match="shard 3 is gone"):
        train(TrainingJob(tiny_model(), training(), Faulty()), context(tmp_path))


def test_held_out_loss_is_measured_before_and_after_in_nats_and_bits(tmp_path: Path) -> None:
    rows: Sequence[Row] = (row((10, 9), 1), row((12,), 2))
    model = tiny_model()
    before = measure(tiny_model(), rows)
    result = train(TrainingJob(model, training(), RandomPlan(), (HeldOutSet("zh", rows, 40),)), context(tmp_path))
    after = measure(model, rows)
    assert before.tokens == after.tokens == 28
    assert result.metrics["heldOut.zh.before.loss"] == pytest.approx(before.loss, rel=1e-6)
    assert result.metrics["heldOut.zh.loss"] == pytest.approx(after.loss, rel=1e-6)
    assert result.metrics["heldOut.zh.bitsPerCharacter"] == pytest.approx(after.nll / math.log(2) / 40, rel=1e-6)
    assert result.metrics["heldOut.zh.perplexity"] == pytest.approx(math.exp(after.loss), rel=1e-6)
    assert result.tokens == sum(item.num_tokens for step in range(6) for item in RandomPlan().rows(step))


def test_metrics_go_to_json_lines_tensorboard_and_the_heartbeat(tmp_path: Path) -> None:
    here = context(tmp_path)
    train(TrainingJob(tiny_model(), training(), RandomPlan()), here)
    lines = [json.loads(line) for line in (here.work / "logs" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokensPerSecond" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learningRate", "gradNorm", "dataWaitShare", "paddingShare", "seconds"} <= steps[0].keys()
    assert list((here.work / "logs" / "tensorboard").iterdir())
    events = [json.loads(line) for line in (here.work / "progress.jsonl").read_text().splitlines()]
    assert events[-1]["activity"] == "train"
    assert (events[-1]["done"], events[-1]["total"], events[-1]["unit"]) == (6, 6, "steps")


def test_training_stops_early_when_the_held_out_loss_no_longer_improves(tmp_path: Path) -> None:
    config = training(held_out={"every_steps": 1}, early_stop=EarlyStop(set="zh", patience=2, min_delta=50.0))
    held_out = (HeldOutSet("zh", (row((12,), 2),), 12),)
    result = train(TrainingJob(tiny_model(), config, RandomPlan(num_steps=30), held_out), context(tmp_path))
    assert result.steps == 3


def test_two_runs_of_one_job_end_bit_for_bit_the_same(tmp_path: Path) -> None:
    ends = []
    for name in ("one", "two"):
        model = tiny_model()
        job = TrainingJob(model, training(precision="bf16", attention_dropout=0.2), RandomPlan())
        ends.append((train(job, context(tmp_path / name)), weights(model)))
    assert ends[0][0] == ends[1][0]
    assert equal_weights(ends[0][1], ends[1][1])


def test_gradient_checkpointing_changes_no_digit(tmp_path: Path) -> None:
    ends = []
    for recompute in (False, True):
        model = tiny_model()
        train(
            TrainingJob(model, training(gradient_checkpointing=recompute), RandomPlan()),
            context(tmp_path / str(recompute)),
        )
        ends.append(weights(model))
    assert equal_weights(*ends)


def test_a_phase_can_change_the_base_of_the_rotary_embedding(tmp_path: Path) -> None:
    model = tiny_model()
    phases = [PhaseSchedule(0, 3, None, None), PhaseSchedule(3, 3, None, 50000.0)]
    schedule = StepSchedule.of(training(), 6, phases)
    train(TrainingJob(model, training(), RandomPlan(), schedule=schedule), context(tmp_path))
    assert model.config.rope_parameters is not None
    assert model.config.rope_parameters["rope_theta"] == 50000.0
    fresh = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 50000.0})
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    assert not set_rope_theta(model, 50000.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_and_new_rows_are_trained_and_nothing_else(tmp_path: Path, precision: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings: dict[str, Any] = {"trainable_token_indices": {"embed_tokens": [190, 191], "lm_head": [190, 191]}}
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], **settings))
    start = weights(adapted)
    train(TrainingJob(adapted, training(precision=precision), RandomPlan()), context(tmp_path))
    end = weights(adapted)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    trained = {name for name, item in adapted.named_parameters() if item.requires_grad}
    assert changed == trained
    assert len(trained) == 2 * 2 + 2


def test_a_lora_head_is_trained_through_its_module(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["lm_head"]))
    result = train(TrainingJob(adapted, training(), RandomPlan(num_steps=2)), context(tmp_path))
    plain = train(TrainingJob(tiny_model(), training(), RandomPlan(num_steps=2)), context(tmp_path / "plain"))
    assert result.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], abs=1e-6)


def test_history_stays_short_however_many_steps_there_are(tmp_path: Path) -> None:
    plan = RandomPlan(num_steps=450, num_rows=1, length=6, masked_share=0.0)
    result = train(TrainingJob(tiny_model(), training(checkpoints={"every_steps": 1000}), plan), context(tmp_path))
    assert len(result.history) <= 230
    assert result.history[-1]["step"] == 450
    assert np.isfinite([point["loss"] for point in result.history]).all()
