"""The plain PyTorch engine: one rank, or several that each hold everything and sum their gradients (ZeRO 0).

DeepSpeed's ZeRO 0 would accumulate gradients in bf16 and costs 14 % of the time although nothing is sharded. This
engine accumulates in fp32 and communicates nothing at one rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagecoach_api.training import Training
from stagecoach_trainer.engine.engine import MASTER, MOMENT_1, MOMENT_2, EngineState, StepReport
from stagecoach_trainer.engine.objective import LanguageModelling, MicroBatch, Objective
from stagecoach_trainer.engine.optimizer import (
    EXP_AVG,
    EXP_AVG_SQ,
    adamw,
    clip_,
    global_norm,
    set_learning_rate,
    set_moments,
)
from stagecoach_trainer.engine.precision import LossScale, MixedPrecision
from stagecoach_trainer.runtime.context import World

BUCKET_ELEMENTS = 1 << 24
"""Elements of the gradients that one all-reduce sums: 64 MiB."""


class PlainEngine:
    """fp32 masters and moments on every rank, copies of them in the compute dtype, fused AdamW."""

    def __init__(
        self,
        model: nn.Module,
        config: Training,
        world: World,
        device: torch.device,
        objective: Objective | None = None,
    ) -> None:
        self.device = device
        self.loss = (objective or LanguageModelling()).module(model)
        self._config = config
        self._world = world
        self._precision = MixedPrecision(model, config.precision)
        self._precision.cast(device)
        self.dtype = self._precision.dtype
        self._scale = LossScale(config.precision)
        self._masters = self._precision.masters
        self._optimizer = adamw(self._masters, config.optimizer)
        self._num_steps = 0
        self._touched: set[int] = set()
        """Ids of the masters that have got a gradient since the last step; the buffers of others hold old ones."""
        for parameter, master in self._precision.copies():
            self._accumulate_in_master(parameter, master)

    def _accumulate_in_master(self, copy: nn.Parameter, master: Tensor) -> None:
        """Add the copy's gradient to its master's in fp32 as soon as the backward pass has computed it, and free it."""

        def move(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            # The first gradient of a step overwrites the buffer that the last step left, which saves zeroing it.
            if master.grad is None:
                master.grad = gradient.float()
            elif id(master) in self._touched:
                master.grad.add_(gradient)
            else:
                master.grad.copy_(gradient)
            self._touched.add(id(master))
            parameter.grad = None

        copy.register_post_accumulate_grad_hook(move)

    def accumulate(self, batch: MicroBatch, scale: float, last: bool) -> Tensor:
        del last
        loss: Tensor = self.loss(batch.to(self.device), scale * self._scale.value)  # the loss scale of fp16, else 1
        loss.backward()
        # A tensor, not a float: reading its value would wait for the GPU after every micro-batch.
        return loss.detach() / self._scale.value if self._scale.enabled else loss.detach()

    def step(self, learning_rate: float) -> StepReport:
        gradients = self._gradients()
        if self._world.size > 1:
            # Before the norm is computed, so that all ranks clip by the same factor and skip the same steps. The sum is
            # not divided by the number of ranks: losses are already divided by the targets of the global batch.
            sum_over_ranks(gradients)
        if self._scale.enabled:
            torch._foreach_mul_(gradients, 1.0 / self._scale.value)
        norm = global_norm(gradients)
        overflow = self._scale.enabled and not bool(torch.isfinite(norm))  # read only with fp16: it waits for a GPU
        self._scale.update(overflow)
        if not overflow:
            if self._config.optimizer.clip is not None:
                clip_(gradients, norm, self._config.optimizer.clip)
            set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
            self._precision.follow()
            self._num_steps += 1
        self._forget_gradients()
        return StepReport(float(norm), overflow)

    def _gradients(self) -> list[Tensor]:
        """Return the gradient of every master, zeros for those a step did not reach: all ranks must reduce the same
        tensors."""
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            elif not isinstance(master, nn.Parameter) and id(master) not in self._touched:
                master.grad.zero_()
        return [master.grad for master in self._masters.values() if master.grad is not None]

    def _forget_gradients(self) -> None:
        """Forget the step's gradients. Masters keep their buffers, which the next step overwrites; a parameter that is
        its own master does not, because autograd would add to it."""
        self._touched.clear()
        for master in self._masters.values():
            if isinstance(master, nn.Parameter):
                master.grad = None

    def state(self) -> EngineState:
        tensors = dict(self._state_tensors()) if self._world.is_main else {}
        return EngineState(tensors, self._num_steps, self._scale.value, self._scale.good_steps)

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._masters.items():
            moments = self._optimizer.state.get(master, {})
            yield MASTER + name, _copy(master)
            for prefix, key in ((MOMENT_1, EXP_AVG), (MOMENT_2, EXP_AVG_SQ)):
                # PyTorch's AdamW creates moments in its first step; until then they are 0.
                yield prefix + name, _copy(moments[key]) if moments else torch.zeros(master.shape)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        if self._world.is_main:
            yield from ((name, master.detach()) for name, master in self._masters.items())

    def load_state(self, state: EngineState) -> None:
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state.tensors[MASTER + name])
                moments = state.tensors[MOMENT_1 + name], state.tensors[MOMENT_2 + name]
                set_moments(self._optimizer, master, *moments, state.num_steps)
        self._precision.follow()
        self._num_steps = state.num_steps
        self._scale.value, self._scale.good_steps = state.loss_scale, state.good_steps

    def finish(self) -> None:
        self._optimizer.state.clear()
        self._precision.restore()


def _copy(tensor: Tensor) -> Tensor:
    # `copy`: on a CPU, `to` would return the master itself, which the next steps change while a checkpoint is written.
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def sum_over_ranks(gradients: list[Tensor]) -> None:
    """Sum gradients over all ranks, in place, many of them in one all-reduce."""
    for bucket in buckets(gradients, BUCKET_ELEMENTS):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)])


def buckets(tensors: list[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of at most `elements` elements in all, or one larger tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > elements:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
