"""Mixed precision: the dtype in which the model computes, and fp32 master weights (arXiv 1710.03740).

The optimiser updates an fp32 master of each trained parameter; the model computes with a copy in bf16 or fp16. Some
parameters are computed with in fp32, without a copy: input embeddings, the head and new rows, because their gradient is
a sum over many positions, which bf16 would lose; and norms, whose weights are near 1, where bf16 takes dozens of steps
to change at all. Frozen parameters, except norms, are kept in the compute dtype only.

States between the layers are in fp32, as under autocast: over 12 steps the loss then differed from that in fp32 by
2e-4, with states in bf16 by 3e-3. Norms and the rotary embedding return the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stagecoach_api.training import Precision
from stagecoach_trainer.kernels.causal import causal_model, decoder_in, output_layer

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}

NEW_ROWS = "trainable_tokens_delta"
"""Part of the name of PEFT's trained rows, which PEFT casts itself."""


class MixedPrecision:
    """Casts a model to a compute dtype and back.

    `masters` holds the fp32 master of each trained parameter by name; it is the parameter itself if the model computes
    in fp32 with it.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self.model = model
        self.dtype = DTYPES[precision]
        self.masters: dict[str, Tensor] = {}
        self._copies: dict[str, nn.Parameter] = {}
        self._frozen = FrozenOriginals()
        self._hooks: list[RemovableHandle] = []
        self._autocast: Any = None
        """The decoder, if it computes under autocast."""

    def cast(self, device: torch.device) -> None:
        """Move the model to `device` and cast it to its compute dtype. Parameters must be in fp32."""
        # By identity: tied parameters appear under several names, and all of them must stay in fp32.
        exact = {id(parameter) for parameter in self._kept_in_fp32()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in exact:  # computed with in fp32: the parameter is its own master, or frozen as it is
                parameter.data = parameter.data.to(device, torch.float32)
                if parameter.requires_grad:
                    self.masters[name] = parameter
            elif not parameter.requires_grad:
                self._frozen.cast(name, parameter, self.dtype)
                parameter.data = parameter.data.to(device)
            else:
                self.masters[name] = parameter.data.to(device, torch.float32)
                parameter.data = self.masters[name].to(self.dtype)
                self._copies[name] = parameter
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)  # never cast: rotary frequencies need fp32
        if self._is_low():
            self._hook_casts()
            self._let_parts_meet(device)

    def copies(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter that is a copy, with its master."""
        for name, parameter in self._copies.items():
            yield parameter, self.masters[name]

    def follow(self) -> None:
        """Copy the masters to the parameters that compute in another dtype."""
        if self._copies:
            copies = [parameter.data for parameter in self._copies.values()]
            torch._foreach_copy_(copies, [self.masters[name] for name in self._copies])

    def restore(self) -> None:
        """Put the masters and the original frozen weights into the model, in fp32 on the CPU."""
        for hook in self._hooks:
            hook.remove()
        if self._autocast is not None:
            del self._autocast.forward
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

    def _kept_in_fp32(self) -> Iterator[Tensor]:
        """Yield the parameters with which the model computes in fp32."""
        if not self._is_low():
            yield from self.model.parameters()
            return
        for module in self.model.modules():
            if is_norm(module):
                yield from module.parameters()
            elif isinstance(module, nn.Embedding) and module.weight.requires_grad:
                yield module.weight
        head = output_layer(self.model)
        if type(head) is nn.Linear and head.weight.requires_grad:
            yield head.weight
        yield from (parameter for name, parameter in self.model.named_parameters() if NEW_ROWS in name)

    def _hook_casts(self) -> None:
        """Cast the outputs of modules whose successor computes in another dtype."""
        causal = causal_model(self.model)
        self._hooks.append(causal.get_input_embeddings().register_forward_hook(_casting_to(torch.float32)))
        for module in causal.modules():
            if is_norm(module) or hasattr(module, "inv_freq"):  # transformers' rotary embeddings hold their frequencies
                self._hooks.append(module.register_forward_hook(_casting_to(self.dtype)))

    def _let_parts_meet(self, device: torch.device) -> None:
        """Compute below the head under autocast if parts in fp32 and parts in the compute dtype do not fit together.

        In most models the casts above are all that is needed. Where a layer reads states that no norm has cast (OLMo 2
        has its norms after the layers), a product of two dtypes fails; a forward pass over a few tokens shows it.
        Autocast chooses the dtype at each operation, at some cost.
        """
        decoder: Any = decoder_in(causal_model(self.model))
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
        was_training = self.model.training
        self.model.eval()  # without dropout, no random number is drawn
        try:
            with torch.no_grad():
                decoder(input_ids=tokens, attention_mask=None, use_cache=False)
        except RuntimeError:
            decoder.forward = _Autocast(decoder.forward, device, self.dtype)
            self._autocast = decoder
        finally:
            self.model.train(was_training)


class _Autocast:
    """A forward pass under autocast."""

    def __init__(self, forward: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> None:
        self._forward = forward
        self._device = device.type
        self._dtype = dtype

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        with torch.autocast(self._device, self._dtype):
            return self._forward(*arguments, **keywords)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer: it has no submodules, and all its parameters are vectors."""
    parameters = list(module.parameters(recurse=False))
    leaf = next(module.children(), None) is None
    return leaf and bool(parameters) and all(parameter.ndim == 1 for parameter in parameters)


def _casting_to(dtype: torch.dtype) -> Callable[[nn.Module, Any, Any], Any]:
    def cast(module: nn.Module, inputs: Any, output: Any) -> Any:
        del module, inputs
        return tuple(one(part) for part in output) if isinstance(output, tuple) else one(output)

    def one(part: Any) -> Any:
        # A complex number, as rotary embeddings of Llama 4 and DeepSeek-V2 return, would lose its imaginary part.
        return part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part

    return cast


class FrozenOriginals:
    """Frozen weights in the compute dtype, and what is needed to restore the originals bit for bit."""

    def __init__(self) -> None:
        self._originals: dict[str, Tensor] = {}

    def cast(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Cast a frozen parameter; its original is kept (on the CPU) only if the cast is lossy."""
        small = parameter.data.to(dtype)
        # Weights released in bf16 survive the round trip, so that a frozen base usually costs no second copy.
        if small.dtype != parameter.dtype and not torch.equal(small.to(parameter.dtype), parameter.data):
            self._originals[name] = parameter.data
        parameter.data = small

    def original(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return the fp32 weight of a frozen parameter before its cast, on the CPU."""
        kept = self._originals.get(name)
        return parameter.data.to("cpu", torch.float32) if kept is None else kept


class LossScale:
    """Dynamic loss scale of fp16 (arXiv 1710.03740): halved after an overflow, doubled after `GROWTH_STEPS` steps
    without one. With other dtypes it stays 1."""

    GROWTH_STEPS = 1000
    LARGEST = 2.0**24

    def __init__(self, precision: Precision) -> None:
        self.enabled = precision is Precision.FP16
        self.value = 2.0**16 if self.enabled else 1.0
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        if not self.enabled:
            return
        if overflow:  # the step was skipped
            self.value /= 2
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_STEPS:
            self.value = min(self.value * 2, self.LARGEST)
            self.good_steps = 0
