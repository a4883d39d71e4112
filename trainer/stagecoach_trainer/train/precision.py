"""Number formats: what the model computes in, and the fp32 master weights behind it.

Trained parameters have a master in fp32, which the optimiser moves; the model computes with a copy in bf16 or fp16 that
follows it. Three kinds are computed with from the master itself, cast as they are used, because their gradient sums up
many positions and would lose them in bf16: input embeddings, the head, and new rows. Frozen parameters are kept in the
compute format only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stagecoach_api.training import Precision
from stagecoach_trainer.train.causal import causal_model

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}

NEW_ROWS = "trainable_tokens_delta"
"""Part of the name of peft's trained rows, which it casts itself."""


class MixedPrecision:
    """Casts a model to a compute format and back.

    `masters` holds the fp32 master of each trained parameter by name; where the model computes with the master itself
    it is the parameter.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self.model = model
        self.dtype = DTYPES[precision]
        self.masters: dict[str, Tensor] = {}
        self._copies: dict[str, nn.Parameter] = {}
        self._frozen = FrozenOriginals()
        self._hooks: list[RemovableHandle] = []

    def cast(self, device: torch.device) -> None:
        """Move the model to `device` and give it its compute format. Parameters must be in fp32."""
        direct = {id(parameter) for parameter in self._computed_from_master()} if self._is_low() else set()
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                self._frozen.cast(name, parameter, self.dtype)
                parameter.data = parameter.data.to(device)
            elif not self._is_low() or id(parameter) in direct:
                parameter.data = parameter.data.to(device, torch.float32)
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.data.to(device, torch.float32)
                parameter.data = self.masters[name].to(self.dtype)
                self._copies[name] = parameter
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)  # never cast: rotary frequencies need fp32

    def copies(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter that is a copy, with its master."""
        for name, parameter in self._copies.items():
            yield parameter, self.masters[name]

    def follow(self) -> None:
        """Let the copies follow their masters."""
        if self._copies:
            copies = [parameter.data for parameter in self._copies.values()]
            torch._foreach_copy_(copies, [self.masters[name] for name in self._copies])

    def restore(self) -> None:
        """Give the model its masters and its original frozen weights, in fp32 on the CPU."""
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self.model.named_parameters():
            if name in self.masters:
                parameter.data = self.masters[name].detach().to("cpu", torch.float32)
            else:
                parameter.data = self._frozen.original(name, parameter)
            parameter.grad = None
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to("cpu")

    def _is_low(self) -> bool:
        return self.dtype is not torch.float32

    def _computed_from_master(self) -> Iterator[Tensor]:
        """Yield the trained parameters the model computes with from the master, and see to their cast."""
        for module in self.model.modules():
            if isinstance(module, nn.Embedding) and module.weight.requires_grad:
                self._hooks.append(module.register_forward_hook(self._cast_output))
                yield module.weight
        head = causal_model(self.model).get_output_embeddings()
        if isinstance(head, nn.Linear) and type(head) is nn.Linear and head.weight.requires_grad:
            yield head.weight
        yield from (parameter for name, parameter in self.model.named_parameters() if NEW_ROWS in name)

    def _cast_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        del module, inputs
        return output.to(self.dtype)


class FrozenOriginals:
    """Frozen weights in the compute format, and what is needed to give back the originals bit for bit."""

    def __init__(self) -> None:
        self._originals: dict[str, Tensor] = {}

    def cast(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Cast a frozen parameter; its original is kept (on the CPU) only where the cast loses something."""
        small = parameter.data.to(dtype)
        if small.dtype != parameter.dtype and not torch.equal(small.to(parameter.dtype), parameter.data):
            self._originals[name] = parameter.data
        parameter.data = small

    def original(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return the fp32 weight a frozen parameter had before its cast, on the CPU."""
        kept = self._originals.get(name)
        return parameter.data.to("cpu", torch.float32) if kept is None else kept


class LossScale:
    """Dynamic loss scale of fp16 (arXiv 1710.03740): halved after an overflow, doubled after a run without any.

    In other formats it is 1 and stays so.
    """

    GROWTH_STEPS = 1000
    LARGEST = 2.0**24

    def __init__(self, precision: Precision) -> None:
        self.enabled = precision is Precision.FP16
        self.value = 2.0**16 if self.enabled else 1.0
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        if not self.enabled:
            return
        if overflow:
            self.value /= 2
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_STEPS:
            self.value = min(self.value * 2, self.LARGEST)
            self.good_steps = 0
