"""States of rows of different lengths, computed without padding, against those of padded rows."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from stagecoach_trainer.kernels import attention, unpadded
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.kernels.ragged_rows import RaggedRows
from stagecoach_trainer.kernels.unpadded import states_at
from tests.trainer.loop.makers import tiny_model

CPU = torch.device("cpu")
LAST = torch.tensor([6, 2, 0, 4])
LENGTH = 7


def batch() -> tuple[Tensor, Tensor]:
    """Tokens of four rows, and requested places: some of each row, no padding."""
    tokens = torch.randint(1, 60, (len(LAST), LENGTH), generator=torch.Generator().manual_seed(3))
    at = torch.cat([torch.arange(int(last) // 2, int(last) + 1) + row * LENGTH for row, last in enumerate(LAST)])
    return tokens, at


def states_and_gradients(fast: bool, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model = tiny_model(**settings)
    loss = CausalLoss(model)
    tokens, at = batch()
    with ExitStack() as stack:
        if fast:
            stack.enter_context(accelerate(loss, CPU, torch.float32))
        states = states_at(loss.decoder, tokens, at, LAST, loss.positions_keyword)
        (states * torch.linspace(-1.0, 1.0, states.numel()).view_as(states)).sum().backward()
    return states.detach(), {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[RaggedRows]:
    """Rows that were computed without padding."""
    made: list[RaggedRows] = []
    whole = RaggedRows.spread

    def noting(rows: RaggedRows, x: Tensor) -> Tensor:
        made.append(rows)
        return whole(rows, x)

    monkeypatch.setattr(RaggedRows, "spread", noting)
    return made


@pytest.mark.parametrize("largest", [1 << 22, 1], ids=["products of our own", "torch's attention"])
@pytest.mark.parametrize("heads", [1, 2, 4], ids=["one key head", "two key heads", "four key heads"])
def test_states_and_gradients_are_those_of_padded_rows(
    heads: int, largest: int, count: list[RaggedRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", largest)
    expected, expected_gradients = states_and_gradients(fast=False, num_key_value_heads=heads)
    assert not count
    got, gradients = states_and_gradients(fast=True, num_key_value_heads=heads)
    assert count
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-5, rtol=1e-5, msg=name)


def test_rows_of_one_length_stay_padded_rows(count: list[RaggedRows], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpadded, "WORTH_UNPADDING", 0.0)
    expected, _ = states_and_gradients(fast=False)
    got, _ = states_and_gradients(fast=True)
    assert not count
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=0)


def test_the_content_of_padding_has_no_influence() -> None:
    tokens, at = batch()
    model = tiny_model()
    loss = CausalLoss(model)
    filled = torch.arange(LENGTH) <= LAST[:, None]
    with accelerate(loss, CPU, torch.float32), torch.no_grad():
        found = [
            states_at(loss.decoder, torch.where(filled, tokens, other), at, LAST, loss.positions_keyword)
            for other in (0, 59)
        ]
    assert torch.equal(*found)
