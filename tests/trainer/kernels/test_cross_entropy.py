"""The chunked cross-entropy against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stagecoach_trainer.kernels.cross_entropy import cross_entropy_sum, cross_entropy_sum_through

N, D, V = 37, 16, 91


def problem(masked: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, positions with loss, targets."""
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=random).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=random).to(dtype).requires_grad_()
    everywhere = torch.arange(N)
    loss_at = everywhere[everywhere % 3 != 0] if masked else everywhere
    return hidden, weight, bias, loss_at, torch.randint(V, (len(loss_at),), generator=random)


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor | None, loss_at: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden[loss_at], weight, bias).double(), targets, reduction="sum")


@pytest.mark.parametrize("masked", [True, False], ids=["some positions masked", "loss everywhere"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [16, 24, 1000], ids=["chunks of 16", "chunks of 24", "one chunk"])
def test_loss_and_gradients_are_those_of_torch(masked: bool, with_bias: bool, rows: int) -> None:
    hidden, weight, bias, loss_at, targets = problem(masked)
    used_bias = bias if with_bias else None
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    scale = 1.0 / len(targets)
    loss = cross_entropy_sum(hidden, weight, loss_at, targets, scale, used_bias, chunk_elements=rows * V)
    expected = oracle(hidden, weight, used_bias, loss_at, targets) * scale
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def test_an_upstream_gradient_scales_the_gradients() -> None:
    hidden, weight, _, loss_at, targets = problem()
    (once,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, loss_at, targets, 0.5), hidden)
    (thrice,) = torch.autograd.grad(3 * cross_entropy_sum(hidden, weight, loss_at, targets, 0.5), hidden)
    torch.testing.assert_close(thrice, 3 * once)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, loss_at, targets = problem()
    frozen = weight.detach()
    cross_entropy_sum(hidden, frozen, loss_at, targets).backward()
    assert frozen.grad is None
    assert hidden.grad is not None


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight, _, loss_at, targets = problem()
    with torch.no_grad():
        loss = cross_entropy_sum(hidden, weight, loss_at, targets)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(oracle(hidden, weight, None, loss_at, targets).item(), rel=1e-6)


def test_a_batch_without_loss_gives_zero_gradients_everywhere() -> None:
    hidden, weight, _, _, _ = problem()
    none = torch.zeros(0, dtype=torch.int64)
    cross_entropy_sum(hidden, weight, none, none).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_in_bf16_the_loss_is_summed_in_fp32() -> None:
    hidden, weight, _, loss_at, targets = problem(dtype=torch.bfloat16)
    loss = cross_entropy_sum(hidden, weight, loss_at, targets, chunk_elements=16 * V)
    logits = F.linear(hidden[loss_at], weight)
    expected = F.cross_entropy(logits.double(), targets, reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_an_fp32_head_over_bf16_states_gets_an_fp32_gradient() -> None:
    hidden, weight, _, loss_at, targets = problem()
    small = hidden.detach().to(torch.bfloat16).requires_grad_()
    cross_entropy_sum(small, weight, loss_at, targets).backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32
    assert small.grad is not None
    assert small.grad.dtype is torch.bfloat16


def test_very_unlikely_targets_have_a_finite_loss() -> None:
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[300.0], [0.0]])
    loss = cross_entropy_sum(hidden, weight, torch.tensor([0]), torch.tensor([1]))
    assert float(loss) == pytest.approx(300.0)


def test_a_head_called_as_a_module_gives_the_same() -> None:
    hidden, weight, bias, loss_at, targets = problem()
    inputs = [hidden, weight, bias]
    loss = cross_entropy_sum_through(
        lambda states: F.linear(states, weight, bias), hidden, loss_at, targets, V, 0.1, chunk_elements=16 * V
    )
    expected = oracle(hidden, weight, bias, loss_at, targets) * 0.1
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
