"""A moving average of the policy's weights over the updates, saved as the stage's result (arXiv 2203.02155, C.4).

It is kept in fp32 on the CPU of rank 0: no computation uses it before the end of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Iterable[tuple[str, Tensor]]
"""Trained parameters by name, unsharded; empty on all ranks but the first."""


class WeightAverage:
    """θ̄ ← decay · θ̄ + (1 - decay) · θ after each update; θ̄ starts as the stage's initial weights."""

    def __init__(self, decay: float, weights: Weights) -> None:
        self._decay = decay
        self.tensors: Mapping[str, Tensor] = {}
        """The average by parameter name, fp32."""
        self.load({name: _copy(weight) for name, weight in weights})

    def follow(self, weights: Weights) -> None:
        """Include the weights after an update in the average."""
        for name, weight in weights:
            self.tensors[name].lerp_(weight.to("cpu", torch.float32), 1.0 - self._decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the average of an earlier attempt."""
        self.tensors = dict(tensors)

    def copied(self) -> dict[str, Tensor]:
        """Return a copy that later updates do not change."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def put_into(self, model: Any) -> None:
        """Overwrite the parameters of a model on the CPU, matched by name, with the average."""
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, tensor in self.tensors.items():
                parameters[name].copy_(tensor)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)
