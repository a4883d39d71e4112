"""Chunked log-probabilities and entropies of tokens against PyTorch's over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stagecoach_trainer.kernels.cross_entropy import Scratch
from stagecoach_trainer.kernels.log_probs import token_log_probs, token_log_probs_through

N, D, V, M = 141, 8, 61, 90
CHUNK = 16 * V
"""Elements of the smallest chunk: six chunks, in two blocks of the head's gradient."""


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, positions in no order, targets."""
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, D, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    at = torch.randperm(N, generator=random)[:M]
    return hidden, weight, bias, at, torch.randint(V, (M,), generator=random)


def oracle(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, at: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Both results from all logits at once, in fp64."""
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())[at] / temperature
    spread = torch.distributions.Categorical(logits=logits)
    return spread.log_prob(targets), spread.entropy()


def mixed(log_probs: Tensor, entropies: Tensor) -> Tensor:
    """A scalar in which every token has another factor, as in PPO."""
    factors = torch.linspace(-1.0, 2.0, M, dtype=torch.float64)
    return (factors * log_probs).sum() / M + (factors.flip(0) * entropies).sum() / M


def both_ways(how: str, *parts: Tensor, temperature: float = 1.0, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The chunked results: from the head's weight, or by calling it as a module."""
    hidden, weight, bias, at, targets = parts
    keywords = {"want_entropy": True, "chunk_elements": CHUNK, **keywords}
    if how == "weight":
        return token_log_probs(hidden, weight, at, targets, temperature, bias, **keywords)
    return token_log_probs_through(
        lambda states: F.linear(states, weight, bias), hidden, at, targets, V, temperature, **keywords
    )


@pytest.mark.parametrize("how", ["weight", "module"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [CHUNK, None], ids=["six chunks", "one chunk"])
def test_values_and_gradients_are_those_of_all_logits_at_once(how: str, temperature: float, chunk: int | None) -> None:
    parts = problem()
    found = both_ways(how, *parts, temperature=temperature, chunk_elements=chunk)
    expected = oracle(*parts, temperature=temperature)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype is torch.float32
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)
    inputs = parts[:3]
    found_gradients = torch.autograd.grad(mixed(*found), inputs)
    for got, wanted in zip(found_gradients, torch.autograd.grad(mixed(*expected), inputs), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", ["weight", "module"])
@pytest.mark.parametrize("want_entropy", [True, False], ids=["with entropy", "without"])
def test_gradients_are_those_of_finite_differences(how: str, want_entropy: bool) -> None:
    hidden, weight, bias, at, targets = problem(torch.float64)

    def results(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = both_ways(how, hidden, weight, bias, at, targets, temperature=1.3, want_entropy=want_entropy)
        return found if want_entropy else found[:1]

    assert torch.autograd.gradcheck(results, (hidden, weight, bias), atol=1e-6, fast_mode=True)


def test_without_entropies_the_log_probs_are_the_same() -> None:
    hidden, weight, _, at, targets = problem()
    alone, nothing = token_log_probs(hidden, weight, at, targets, chunk_elements=CHUNK)
    beside, _ = token_log_probs(hidden, weight, at, targets, want_entropy=True, chunk_elements=CHUNK)
    assert nothing.shape == (0,)
    assert not nothing.requires_grad
    assert torch.equal(alone, beside)


def test_without_gradients_the_values_are_the_same_to_the_bit() -> None:
    parts = problem()
    with_gradients = both_ways("weight", *parts)
    with torch.no_grad():
        without = both_ways("weight", *parts)
    for got, wanted in zip(without, with_gradients, strict=True):
        assert not got.requires_grad
        assert torch.equal(got, wanted)


def test_reused_memory_changes_nothing() -> None:
    parts, scratch = problem(), Scratch()
    fresh = torch.autograd.grad(mixed(*both_ways("weight", *parts)), parts[:3])
    for _ in range(2):
        again = torch.autograd.grad(mixed(*both_ways("weight", *parts, scratch=scratch)), parts[:3])
        assert all(torch.equal(one, other) for one, other in zip(fresh, again, strict=True))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, at, targets = problem()
    frozen = weight.detach()
    token_log_probs(hidden, frozen, at, targets)[0].sum().backward()
    assert frozen.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("how", ["weight", "module"])
def test_no_positions_give_no_values_and_zero_gradients(how: str) -> None:
    hidden, weight, bias, _, _ = problem()
    none = torch.zeros(0, dtype=torch.int64)
    log_probs, entropies = both_ways(how, hidden, weight, bias, none, none)
    assert log_probs.shape == entropies.shape == (0,)
    (log_probs.sum() + entropies.sum()).backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_bf16_states_and_an_fp32_head_give_fp32_results_and_gradients_of_each_dtype() -> None:
    hidden, weight, _, at, targets = problem()
    small = hidden.detach().to(torch.bfloat16).requires_grad_()
    found = token_log_probs(small, weight, at, targets, want_entropy=True, chunk_elements=CHUNK)
    rounded = F.linear(small, weight.to(torch.bfloat16))[at]  # the product itself is in bf16; what follows is not
    expected = torch.distributions.Categorical(logits=rounded.double())
    torch.testing.assert_close(found[0].double(), expected.log_prob(targets), atol=2e-6, rtol=0)
    torch.testing.assert_close(found[1].double(), expected.entropy(), atol=2e-6, rtol=0)
    gradients = torch.autograd.grad(mixed(*found), (small, weight))
    wanted = torch.autograd.grad(mixed(*oracle(small, weight, None, at, targets)), (small, weight))
    assert [item.dtype for item in gradients] == [torch.bfloat16, torch.float32]
    for got, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got.float(), right.float(), atol=2e-2, rtol=2e-2)


def test_very_unlikely_tokens_and_a_sure_model_have_finite_values_and_gradients() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[300.0], [0.0]])
    log_probs, entropies = token_log_probs(hidden, weight, torch.tensor([0]), torch.tensor([1]), want_entropy=True)
    assert float(log_probs) == pytest.approx(-300.0)
    assert float(entropies) == 0.0
    (gradient,) = torch.autograd.grad((log_probs + entropies).sum(), hidden)
    assert float(gradient) == pytest.approx(-300.0)


class _LargestTensor(TorchDispatchMode):
    """Notes the most elements that any result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("how", ["weight", "module"])
def test_neither_pass_holds_all_logits(how: str) -> None:
    parts = problem()
    with _LargestTensor() as largest:  # type: ignore[no-untyped-call]
        mixed(*both_ways(how, *parts)).backward()
    assert CHUNK <= largest.elements < M * V
