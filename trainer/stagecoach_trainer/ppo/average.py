"""A moving average of the policy's weights over the updates, which then is the result (arXiv 2203.02155, C.4).

It is fp32 and lies on the CPU of rank 0: nothing computes with it before the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Iterable[tuple[str, Tensor]]
"""Trained parameters by name, whole; none on ranks but the first."""


class WeightAverage:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ after each update, from the weights that the stage starts with."""

    def __init__(self, decay: float, weights: Weights) -> None:
        self._decay = decay
        self.tensors: Mapping[str, Tensor] = {}
        """The average by parameter name, fp32."""
        self.load({name: _copy(weight) for name, weight in weights})

    def follow(self, weights: Weights) -> None:
        """Take the weights after an update into account."""
        for name, weight in weights:
            self.tensors[name].lerp_(weight.to("cpu", torch.float32), 1.0 - self._decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the average of an earlier attempt."""
        self.tensors = dict(tensors)

    def copied(self) -> dict[str, Tensor]:
        """Return a copy that later updates leave alone."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def put_into(self, model: Any) -> None:
        """Give a model on the CPU, whose parameters have these names, the average for its weights."""
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, tensor in self.tensors.items():
                parameters[name].copy_(tensor)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)
