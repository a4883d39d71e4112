"""The DeepSpeed engine: ZeRO 1–3 over several ranks, or offload at any number of them (arXiv 1910.02054, 2101.06840).

DeepSpeed makes its fp32 masters from weights it has already cast, and creates optimiser states at the first step. So
weights, moments and counters are set through its public accessors, in this order: fp32 parameters; one step at learning
rate 0, which creates the states and updates the compute weights; parameters, moments and counters again.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_api.training import Offload, Precision, Training
from stagecoach_trainer.engine.engine import MASTER, MOMENT_1, MOMENT_2, EngineState, StepReport
from stagecoach_trainer.engine.objective import LanguageModelling, MicroBatch, Objective
from stagecoach_trainer.engine.optimizer import EXP_AVG, EXP_AVG_SQ, adamw, set_learning_rate, set_moments
from stagecoach_trainer.engine.precision import DTYPES, FrozenOriginals, LossScale
from stagecoach_trainer.kernels.causal import head_weight
from stagecoach_trainer.runtime.context import World

PARAMETERS_SHARDED = 3
"""The ZeRO stage that shards parameters as well."""


class ShardedEngine:
    """Shards optimiser state, gradients and, with ZeRO-3, parameters across the ranks."""

    def __init__(
        self,
        model: nn.Module,
        config: Training,
        world: World,
        device: torch.device,
        objective: Objective | None = None,
    ) -> None:
        deepspeed = import_deepspeed(device, world)
        self.device = device
        self.dtype = DTYPES[config.precision]
        self._objective = objective or LanguageModelling()
        self.loss: Any = self._objective.module(model)
        self._model = model
        self._world = world
        self._stage = config.sharding.zero
        self._fp16 = config.precision is Precision.FP16
        self._trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
        self._frozen = FrozenOriginals()
        for name, item in model.named_parameters():
            if not item.requires_grad:
                self._frozen.cast(name, item, self.dtype)
        originals = self._lossy_weights()  # DeepSpeed casts the parameters in place, so they are copied before
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.loss,
            optimizer=adamw(self._trained, config.optimizer),
            config=deepspeed_config(config, world),
            dist_init_required=False,
        )
        if self._stage == PARAMETERS_SHARDED:
            self._register_external_uses(deepspeed)
        else:
            self._make_moments()
        self._num_steps = 0
        if originals:
            self._put(originals)
            self._create_states()
            self._put(originals)
            self._set_step_counters()

    def _lossy_weights(self) -> dict[str, Tensor]:
        """Return copies of all trained fp32 weights, or nothing if casting them is lossless."""
        lossless = all(torch.equal(item.data.to(self.dtype).float(), item.data) for item in self._trained.values())
        return {} if lossless else {name: item.data.clone() for name, item in self._trained.items()}

    def _register_external_uses(self, deepspeed: Any) -> None:
        """Register parameters with ZeRO-3 that are used outside the module that holds them."""
        register_head(deepspeed, self.loss)
        register_rows(deepspeed, self._model)

    def _make_moments(self) -> None:
        """Create all moments before the first step: ZeRO 1 and 2 link the states of all parameter groups as soon as the
        first group has made a step, when the second group has none yet."""
        inner = self._deepspeed.optimizer.optimizer
        for partition in (item for group in inner.param_groups for item in group["params"]):
            zeros = torch.zeros_like(partition)
            set_moments(inner, partition, zeros, zeros, num_steps=0)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def accumulate(self, batch: MicroBatch, scale: float, last: bool) -> Tensor:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over the ranks; the objective defines a sum.
        loss: Tensor = self._deepspeed(batch.to(self.device), scale * self._world.size)
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        return loss.detach() / self._world.size

    def step(self, learning_rate: float) -> StepReport:
        set_learning_rate(self._deepspeed.optimizer, learning_rate)
        self._deepspeed.step()
        skipped = self._fp16 and bool(self._deepspeed.optimizer.overflow)
        self._num_steps += not skipped
        norm = self._deepspeed.get_global_grad_norm()
        return StepReport(float("nan") if norm is None else float(norm), skipped)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> EngineState:
        if self._num_steps == 0:
            self._create_unused_states()
        tensors = {}
        for key, tensor in self._full_tensors():
            if self._world.is_main:
                tensors[key] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        scale, good_steps = self._loss_scale()
        return EngineState(tensors, self._num_steps, scale, good_steps)

    def _full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the state, gathered from all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, item in self._trained.items():
            yield MASTER + name, safe_get_full_fp32_param(item)
            yield MOMENT_1 + name, safe_get_full_optimizer_state(item, EXP_AVG)
            yield MOMENT_2 + name, safe_get_full_optimizer_state(item, EXP_AVG_SQ)

    def load_state(self, state: EngineState) -> None:
        masters = {name: state.tensors[MASTER + name] for name in self._trained}
        self._put(masters)
        self._create_states()
        self._put(masters)
        for name, item in self._trained.items():
            for prefix, key in ((MOMENT_1, EXP_AVG), (MOMENT_2, EXP_AVG_SQ)):
                self._set(item, state.tensors[prefix + name], key)
        self._num_steps = state.num_steps
        self._set_step_counters()
        self._set_loss_scale(state.loss_scale, state.good_steps)

    def _put(self, masters: dict[str, Tensor]) -> None:
        for name, item in self._trained.items():
            self._set(item, masters[name])

    def _set(self, item: nn.Parameter, full: Tensor, moment: str | None = None) -> None:
        """Set the fp32 master of a parameter, or one of its moments, from the full tensor that every rank has."""
        from deepspeed import utils

        value = full.to(self.device)
        if self._stage == PARAMETERS_SHARDED:  # the full accessor requires a size divisible by the number of ranks
            value = self._own_part(item, value)
            set_master, set_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        else:
            set_master, set_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if moment is None:
            set_master(item, value)
        else:
            set_moment(item, value, moment)

    def _own_part(self, item: Any, full: Tensor) -> Tensor:
        """Return this rank's partition of a parameter under ZeRO-3, zero-padded as DeepSpeed pads it."""
        size = item.ds_tensor.numel()
        part = full.new_zeros(size)
        own = full.reshape(-1)[self._world.rank * size : (self._world.rank + 1) * size]
        part[: own.numel()] = own
        return part

    def _create_states(self) -> None:
        """Make a step at learning rate 0 on an empty micro-batch, which creates the optimiser states."""
        was_training = self.loss.training
        self.loss.eval()  # dropout would draw random numbers
        self.accumulate(self._objective.collate(()), 1.0, last=True)
        set_learning_rate(self._deepspeed.optimizer, 0.0)
        self._deepspeed.step()
        self.loss.train(was_training)

    def _create_unused_states(self) -> None:
        """Create the states of an optimiser without steps, such as the policy's while its critic warms up."""
        scale = self._loss_scale()
        self._create_states()
        self._set_step_counters()
        self._set_loss_scale(*scale)

    def _set_step_counters(self) -> None:
        for state in self._deepspeed.optimizer.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(self._num_steps))

    def _loss_scale(self) -> tuple[float, int]:
        if not self._fp16:
            return 1.0, 0
        scaler = self._deepspeed.optimizer.loss_scaler
        # DeepSpeed counts iterations and stores that of the last overflow; their distance is our `good_steps`.
        return float(scaler.cur_scale), int(scaler.cur_iter - scaler.last_overflow_iter - 1)

    def _set_loss_scale(self, scale: float, good_steps: int) -> None:
        if self._fp16:
            scaler = self._deepspeed.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = scale, good_steps, -1

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        masters = dict(self.masters())
        frozen = dict(self._final_frozen())
        self._deepspeed.destroy()
        if self._world.is_main:
            replace_parameters(self._model, masters | frozen)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, item in self._trained.items():
            full = safe_get_full_fp32_param(item)
            if self._world.is_main:
                yield name, full.detach().to("cpu", torch.float32, copy=True)

    def _final_frozen(self) -> Iterator[tuple[str, Tensor]]:
        for name, item in self._model.named_parameters():
            if name not in self._trained:
                with gathered(item, self._stage):
                    full = self._frozen.original(name, item)
                if self._world.is_main:
                    yield name, full


def shard_frozen(module: Any, config: Training, world: World, device: torch.device) -> None:
    """Shard an inference-only model's parameters across ranks by ZeRO-3, offloaded if the stage's are.

    `module` gathers them when it is called, which all ranks must do at the same time.
    """
    deepspeed = import_deepspeed(device, world)
    settings = deepspeed_config(config, world)
    settings["zero_optimization"].pop("offload_optimizer", None)  # there is no optimiser
    deepspeed.initialize(model=module, config=settings, dist_init_required=False)
    register_head(deepspeed, module)
    register_rows(deepspeed, module)


def shards_frozen_models(config: Training, world: World) -> bool:
    """Return whether inference-only models are sharded across the ranks as well."""
    return world.size > 1 and config.sharding.zero == PARAMETERS_SHARDED


def register_head(deepspeed: Any, module: Any) -> None:
    """Register the weight of a module's head with ZeRO-3: the module uses it without calling the head."""
    head = getattr(module, "head", None)
    if head is None:
        return
    plain = isinstance(head, nn.Linear) and head_weight(head) is not None
    if plain:
        for item in head.parameters():
            deepspeed.zero.register_external_parameter(module, item)
    module.through_module = not plain


def register_rows(deepspeed: Any, model: nn.Module) -> None:
    """Register the weights that PEFT's trained rows read from the layer they wrap, without calling it."""
    for module in model.modules():
        if hasattr(module, "get_merged_weights"):
            for item in module.parameters():
                deepspeed.zero.register_external_parameter(module, item)


def gathered(parameter: nn.Parameter, stage: int) -> Any:
    """Return a context in which a parameter that ZeRO-3 may have sharded is complete."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter, enabled=stage == PARAMETERS_SHARDED)


def replace_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace a model's parameters by name. Tied parameters stay tied; DeepSpeed's attributes and hooks are dropped."""
    fresh = {
        id(old): nn.Parameter(tensors[name], requires_grad=old.requires_grad) for name, old in model.named_parameters()
    }
    for module in model.modules():
        own = {name: None if old is None else fresh[id(old)] for name, old in module._parameters.items()}
        module.__dict__["_parameters"] = own  # ZeRO-3 replaces this dictionary by a class of its own
    for buffer in model.buffers():
        buffer.data = buffer.data.to("cpu")


def deepspeed_config(config: Training, world: World) -> dict[str, Any]:
    """Return DeepSpeed's configuration. Its batch sizes are formal, as the loop shards batches itself."""
    sharding = config.sharding
    accumulated = 2  # above 1, gradients are kept between micro-batches; `accumulate` sets the boundary
    zero: dict[str, Any] = {
        "stage": sharding.zero,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if sharding.offload_optimizer is Offload.CPU:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if sharding.offload_parameters is Offload.CPU:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulated,
        "train_batch_size": accumulated * world.size,
        "gradient_clipping": 0.0 if config.optimizer.clip is None else config.optimizer.clip,
        "bf16": {"enabled": config.precision is Precision.BF16},
        "fp16": {
            "enabled": config.precision is Precision.FP16,
            "initial_scale_power": 16,
            "loss_scale_window": LossScale.GROWTH_STEPS,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW supports CPUs, and needs no compilation
        "steps_per_print": None,
    }


def import_deepspeed(device: torch.device, world: World) -> Any:
    """Import DeepSpeed for this device, without its log lines and without operators it would compile at first use."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed requires it even without torchrun
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls deprecated functions of torch.distributed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        # Its shared-memory collectives take a minute to compile, and results are reproducible with gloo's alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
