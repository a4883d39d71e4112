"""Fast paths on a CPU: the loss and gradients of transformers' own implementation, and removed afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from stagecoach_api.training import Precision
from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.engine.precision import MixedPrecision
from stagecoach_trainer.kernels import attention, fast_llama
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.kernels.gradient_proof import GROUPS, INPUTS, gradients_of
from stagecoach_trainer.kernels.proof_rows import ProofRows
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


# -- backward passes ---------------------------------------------------------------------------------------------------


def norms_without_mean(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
    normal, weight, scale = ctx.saved_tensors
    return d_out * weight * scale, (d_out * normal).sum(0), None, None


def norms_with_double_weights(ctx: Any, d_out: Tensor) -> tuple[Tensor, Any, None, None]:
    d_x, d_weight, *_ = RIGHT_NORMS(ctx, d_out)
    return d_x, d_weight if d_weight is None else 2 * d_weight, None, None


def rotation_that_is_not_undone(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
    cos, sin = ctx.saved_tensors
    half = d_out.shape[-1] // 2
    turned = torch.cat([-d_out[..., half:], d_out[..., :half]], dim=-1)
    return d_out * cos + turned * sin, None, None


def attention_without_keys(q: Tensor, k: Tensor, *others: Any) -> Tensor:
    return RIGHT_ATTENTION(q, k.detach(), *others)


def layer_without_states(layer: Any, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    found: Tensor = RIGHT_LAYER(layer, hidden, *arguments, **keywords)
    return found.detach() + (found - found.detach()) * 3


RIGHT_NORMS, RIGHT_ATTENTION = fast_llama._RmsNorm.backward, attention._weighted_values
RIGHT_LAYER = fast_llama._TrimmedLayer.__call__
FAULTS: dict[str, tuple[str, Any, str, Any]] = {
    "norms: no mean": ("norms", fast_llama._RmsNorm, "backward", staticmethod(norms_without_mean)),
    "norms: weights": ("norms", fast_llama._RmsNorm, "backward", staticmethod(norms_with_double_weights)),
    "rotation": ("rotary embedding", fast_llama._Rotate, "backward", staticmethod(rotation_that_is_not_undone)),
    "attention": ("attention", attention, "_weighted_values", attention_without_keys),
    "last layer": ("last layer", fast_llama._TrimmedLayer, "__call__", layer_without_states),
}


@pytest.mark.parametrize(("precision", "dtype"), [(Precision.FP32, torch.float32), (Precision.BF16, torch.bfloat16)])
@pytest.mark.parametrize(("path", "holder", "name", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fast_path_with_a_wrong_backward_pass_is_not_used(
    path: str,
    holder: Any,
    name: str,
    fault: Any,
    precision: Precision,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loss is right, and training would have gone in another direction."""
    rows = BATCHES["few positions with loss"]
    expected, expected_gradients = loss_and_gradients(rows, fast=False)
    monkeypatch.setattr(holder, name, fault)
    state = torch.random.get_rng_state()
    with caplog.at_level("INFO"):
        got, gradients = loss_and_gradients(rows, fast=True)
        model = tiny_model()
        MixedPrecision(model, precision).cast(CPU)
        with accelerate(CausalLoss(model), CPU, dtype):
            pass
    assert torch.equal(state, torch.random.get_rng_state())
    lines = [line for line in caplog.messages if "keeps its own" in line]
    assert len(lines) == 2
    assert all(f"keeps its own {path}: with the faster one, the gradient of" in line for line in lines)
    assert float(got) == pytest.approx(float(expected), abs=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], atol=1e-6, rtol=0, msg=key)


def test_right_fast_paths_are_used_and_the_proof_keeps_no_gradients(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    loss = CausalLoss(model)
    with caplog.at_level("INFO"), accelerate(loss, CPU, torch.float32):
        assert loss.positions_keyword is not None
    assert not caplog.messages
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_proof_compares_are_the_gradients_of_the_loss() -> None:
    """Against those of autograd: of norms as they are, of the embedding summed over ids with the same remainder."""
    model = tiny_model().eval()
    loss = CausalLoss(model)
    rows = ProofRows.of([np.arange(3, 60, dtype=np.int32)], 40).short
    found = gradients_of(loss, loss.expected, rows)
    model(input_ids=rows.tokens, labels=rows.labels).loss.backward()
    whole: Any = model.get_input_embeddings().weight.grad
    groups = torch.stack([whole[group::GROUPS].sum(0) for group in range(GROUPS)])
    torch.testing.assert_close(found[INPUTS], groups)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.testing.assert_close(found[name], parameter.grad)


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
