"""Fast paths on a CPU: the loss and gradients of transformers' own implementation, and removed afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.kernels import attention
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from tests.trainer.loop.makers import RandomPlan, context, row, tiny_model, training

CPU = torch.device("cpu")
BATCHES = {
    "one sample a row": [row((14,), 1), row((9,), 2)],
    "packed rows": [row((5, 9), 1), row((3, 3, 3), 2)],
    "few positions with loss": [row((5, 9), 1, 0.8), row((8,), 2, 1.0)],
}


def loss_and_gradients(rows: list[Row], fast: bool, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model = tiny_model(**settings)
    loss = CausalLoss(model)
    with accelerate(loss, CPU, torch.float32) if fast else nullcontext():
        value = loss(collate(rows), 0.1)
        value.backward()
    return value.detach(), {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("heads", [1, 2, 4], ids=["one key head", "two key heads", "four key heads"])
def test_loss_and_gradients_are_those_of_transformers(rows: list[Row], heads: int) -> None:
    expected, expected_gradients = loss_and_gradients(rows, fast=False, num_key_value_heads=heads)
    got, gradients = loss_and_gradients(rows, fast=True, num_key_value_heads=heads)
    assert float(got) == pytest.approx(float(expected), abs=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=0, msg=name)


def test_too_many_probabilities_are_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = loss_and_gradients(BATCHES["packed rows"], fast=True)
    monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", 1)
    got, _ = loss_and_gradients(BATCHES["packed rows"], fast=True)
    assert float(got) == pytest.approx(float(expected), abs=1e-6)


def test_a_batch_without_loss_leaves_zero_gradients() -> None:
    value, gradients = loss_and_gradients([row((6,), 1, 1.0)], fast=True)
    assert float(value) == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("device", "attention", "expected"),
    [("cpu", "sdpa", (True, True)), ("cpu", "eager", (False, True)), ("meta", "sdpa", (False, False))],
)
def test_fast_paths_are_for_cpus_and_for_the_attention_that_they_replace(
    device: str, attention: str, expected: tuple[bool, bool]
) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    loss = CausalLoss(model)
    rotate = modeling_llama.apply_rotary_pos_emb
    with accelerate(loss, torch.device(device), torch.float32):
        replaced = model.config._attn_implementation != attention, loss.positions_keyword is not None
        assert (modeling_llama.apply_rotary_pos_emb is not rotate) == expected[1]
    assert replaced == expected
    assert loss.positions_keyword is None


def test_the_model_is_unchanged_after_training(tmp_path: Path) -> None:
    model = tiny_model()
    rotate = modeling_llama.apply_rotary_pos_emb
    train(TrainingJob(model, training(), RandomPlan(num_steps=2)), context(tmp_path))
    assert model.config._attn_implementation == "sdpa"
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_attention_dropout_drops_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    module = tiny_model().model.layers[0].self_attn.train()
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.ones(1, 2, 6, 8)
    dropped = torch.stack([attention.attend(module, q, k, v, None, dropout=0.5)[0] for _ in range(400)])
    assert dropped.std() > 0.1
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)
    whole, _ = attention.attend(module.eval(), q, k, v, None, dropout=0.5)
    torch.testing.assert_close(whole, torch.ones(1, 6, 4, 8))
