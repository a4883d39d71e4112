"""Loss and gradients are those of one big batch, however it is divided."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagecoach_api.training import Optimizer
from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import IGNORE, Row
from stagecoach_trainer.batches.shard import shard_batch
from stagecoach_trainer.engine.plain import PlainEngine
from stagecoach_trainer.runtime.context import World
from tests.trainer.loop.makers import row, tiny_model, training, weights

ROWS = [row((5, 9), 1, 0.3), row((12,), 2, 0.9), row((3, 3, 3), 3), row((14,), 4, 0.5), row((8,), 5, 1.0)]


def one_big_batch(model: nn.Module, rows: list[Row]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by transformers' own logits and torch's cross-entropy, sample by sample."""
    logits, targets = [], []
    for item in rows:
        start = 0
        for length in item.lengths:
            part = slice(start, start + length)
            start += length
            logits.append(model(torch.tensor(item.tokens[part])[None].long(), use_cache=False).logits[0])
            targets.append(torch.tensor(item.labels[part]).long())
    loss = F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=IGNORE)
    loss.backward()
    return float(loss.detach()), {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


@pytest.mark.parametrize("tie", [False, True], ids=["own head", "head tied to the embedding"])
@pytest.mark.parametrize("micro_rows", [1, 2, 3, 5])
def test_any_micro_batch_gives_the_loss_and_gradients_of_one_big_batch(micro_rows: int, tie: bool) -> None:
    expected_loss, expected = one_big_batch(tiny_model(tie=tie), ROWS)
    model = tiny_model(tie=tie)
    engine = PlainEngine(model, training(), World(), torch.device("cpu"))
    share = shard_batch(ROWS, micro_rows)
    loss = sum(
        float(engine.accumulate(collate(batch), 1.0 / share.num_targets, last=True)) for batch in share.micro_batches
    )
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for name, item in model.named_parameters():
        assert item.grad is not None
        torch.testing.assert_close(item.grad, expected[name], atol=1e-6, rtol=0, msg=name)


def test_a_step_is_that_of_torch_adamw_with_clipping() -> None:
    smooth = 1e-3  # Adam's first step is a sign otherwise, and turns rounding into steps
    config = training(optimizer=Optimizer(learning_rate=0.01, weight_decay=0.1, epsilon=smooth))
    reference = tiny_model()
    _, gradients = one_big_batch(reference, ROWS)
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    matrices = [item for item in reference.parameters() if item.ndim > 1]
    vectors = [item for item in reference.parameters() if item.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=smooth).step()
    model = tiny_model()
    engine = PlainEngine(model, config, World(), torch.device("cpu"))
    share = shard_batch(ROWS, 2)
    for batch in share.micro_batches:
        engine.accumulate(collate(batch), 1.0 / share.num_targets, last=True)
    report = engine.step(0.01)
    assert gradients
    assert report.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    for name, expected in weights(reference).items():
        torch.testing.assert_close(weights(model)[name], expected, atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_fp32(precision: str) -> None:
    expected_loss, _ = one_big_batch(tiny_model(), ROWS)
    engine = PlainEngine(tiny_model(), training(precision=precision), World(), torch.device("cpu"))
    share = shard_batch(ROWS, 5)
    loss = sum(
        float(engine.accumulate(collate(batch), 1.0 / share.num_targets, last=True)) for batch in share.micro_batches
    )
    assert loss == pytest.approx(expected_loss, rel=5e-3)


def test_fp16_skips_a_step_that_overflows_and_halves_the_loss_scale() -> None:
    model = tiny_model()
    engine = PlainEngine(model, training(precision="fp16"), World(), torch.device("cpu"))
    batch = collate(ROWS)
    engine.accumulate(batch, 1e6, last=True)
    before = {name: tensor.clone() for name, tensor in engine.state().tensors.items()}
    report = engine.step(0.01)
    after = engine.state()
    assert report.skipped
    assert (after.loss_scale, after.num_steps) == (2.0**15, 0)
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.items())


def test_master_weights_keep_what_bf16_cannot_represent() -> None:
    model = tiny_model()
    engine = PlainEngine(model, training(precision="bf16"), World(), torch.device("cpu"))
    start = weights(tiny_model())
    for _ in range(3):
        engine.accumulate(collate(ROWS), 0.01, last=True)
        engine.step(1e-5)  # far below a bf16 step of these weights
    engine.finish()
    moved = [(weights(model)[name] - start[name]).abs().max() for name in start]
    assert all(0 < float(change) < 1e-4 for change in moved)


def test_frozen_weights_are_restored_bit_for_bit() -> None:
    model = tiny_model()
    start = weights(model)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    engine = PlainEngine(model, training(precision="bf16"), World(), torch.device("cpu"))
    engine.accumulate(collate(ROWS), 0.01, last=True)
    engine.step(1e-3)
    engine.finish()
    end = weights(model)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"lm_head.weight"}
