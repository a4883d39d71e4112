"""Packed samples do not see each other: the numbers, and the check that proves it on the running model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.engine.packing_check import check_packing
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from stagecoach_trainer.loop.measure import measure_with
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.loop.makers import RandomPlan, WatchedSchedule, context, row, tiny_model, training

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_samples_have_the_logits_and_the_loss_of_samples_alone(attention: str) -> None:
    model = tiny_model(attn_implementation=attention).eval()
    loss = CausalLoss(model)
    item = row((7, 12, 5), 3, masked_share=0.2)
    with torch.no_grad():
        packed = model.lm_head(loss.hidden(collate([item])))[0]
        alone = torch.cat([model.lm_head(loss.hidden(collate([part])))[0] for part in item.samples()])
        packed_loss = loss(collate([item]), 1.0)
        alone_loss = sum(loss(collate([part]), 1.0) for part in item.samples())
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    assert float(packed_loss) == pytest.approx(float(alone_loss), rel=1e-6)


def test_padding_changes_nothing() -> None:
    loss = CausalLoss(tiny_model().eval())
    short, long = row((4, 5), 1), row((9, 11), 2)
    with torch.no_grad():
        together = loss(collate([short, long]), 1.0)
        apart = loss(collate([short]), 1.0) + loss(collate([long]), 1.0)
    assert float(together) == pytest.approx(float(apart), rel=1e-6)


def test_the_check_passes_if_nothing_leaks() -> None:
    loss = CausalLoss(tiny_model())
    assert check_packing(loss, [row((9,), 1), row((8, 9), 2)], CPU, torch.float32) == 0.0


def test_the_check_is_skipped_if_no_row_is_packed() -> None:
    assert check_packing(CausalLoss(tiny_model()), [row((9,), 1)], CPU, torch.float32) is None


class LeakyLoss(CausalLoss):
    """Uses a cache, with which transformers 5.23 lets packed samples see each other."""

    def hidden(self, batch: Any, **keywords: Any) -> torch.Tensor:
        state: torch.Tensor = self.decoder(
            input_ids=batch.tokens, position_ids=batch.positions, use_cache=True, **keywords
        ).last_hidden_state
        return state


def test_the_check_fails_if_samples_leak() -> None:
    with pytest.raises(UserError, match="packed samples see each other"):
        check_packing(LeakyLoss(tiny_model()), [row((8, 9), 2)], CPU, torch.float32)


def test_a_leak_stops_training_before_its_first_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagecoach_trainer.engine.objective.CausalLoss", LeakyLoss)
    with pytest.raises(UserError, match="packing: false"):
        train(TrainingJob(tiny_model(), training(), RandomPlan()), context(tmp_path))


def test_a_leak_stops_training_before_the_first_step_that_is_packed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagecoach_trainer.engine.objective.CausalLoss", LeakyLoss)
    made: list[int] = []

    job = TrainingJob(
        tiny_model(), training(), RandomPlan(packed_from=2), schedule=WatchedSchedule(on_step=made.append)
    )
    with pytest.raises(UserError, match="packed samples see each other"):
        train(job, context(tmp_path))
    assert made == [0, 1]


def test_held_out_rows_are_split_for_a_model_that_leaks() -> None:
    model, rows = tiny_model(), [row((8, 9), 1), row((5, 6, 7), 2)]
    alone = [sample for item in rows for sample in item.samples()]
    expected = measure_with(CausalLoss(model), alone, 2, CPU, World()).nll
    assert measure_with(CausalLoss(model), rows, 2, CPU, World()).nll == pytest.approx(expected, rel=1e-6)
    assert measure_with(LeakyLoss(model), rows, 2, CPU, World()).nll == pytest.approx(expected, rel=1e-6)
    leaking = LeakyLoss(model)
    leaking.leak = 0.0
    assert abs(measure_with(leaking, rows, 2, CPU, World()).nll - expected) > 1e-2
