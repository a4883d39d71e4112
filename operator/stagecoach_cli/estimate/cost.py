"""The cost of a stage: tokens, time, GPU-hours and memory, from its last run or else from the FLOPs of its model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from stagecoach_api.artifacts import Manifest
from stagecoach_api.kinds.dpo import DpoStage
from stagecoach_api.kinds.export import ExportStage
from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_api.stage_kind import StageConfig
from stagecoach_api.training import Offload, Precision, Training
from stagecoach_cli.estimate.hardware import Hardware, hardware_of
from stagecoach_cli.estimate.model_size import ModelLibrary, ModelShape, UnknownSize, model_shape
from stagecoach_core.values import Plan
from stagecoach_local.machine import Machine

START_SECONDS = 20.0
"""Time from starting a process that imports torch to its first step."""
SECONDS_PER_HOUR = 3600.0
ACTIVATION_BYTES = 34
"""Bytes of activations per token, layer and hidden unit of a block whose attention keeps no scores
(arXiv 2205.05198, equation 1 without its second term)."""
CHECKPOINT_BYTES = 2
"""The same with gradient checkpointing: the input of each block in bf16."""
GRADIENT_BYTES, MOMENT_BYTES, MASTER_BYTES = 4, 8, 4
"""Bytes per trained parameter: gradients are summed in fp32, AdamW keeps two moments, and next to weights in bf16 or
fp16 a copy in fp32 (arXiv 1910.02054, section 3.1, has 2 bytes of gradients)."""
EXPORT_PASSES = 3
"""Forward passes of an export's proof: before, after merging, and of the release."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a stage."""

    hardware: Hardware
    tokens: int | None = None
    """Training tokens; None for other stages, and if they depend on data that does not exist yet."""
    seconds: float | None = None
    """None if unknown."""
    memory: GpuMemory | None = None
    """None without GPUs, or if the size of the model is unknown."""
    unknown: str = ""
    """Why the time is unknown; empty if it is known."""

    @property
    def gpu_hours(self) -> float | None:
        """None if the time is unknown."""
        return None if self.seconds is None else self.seconds * self.hardware.num_gpus / SECONDS_PER_HOUR

    @property
    def fits(self) -> bool:
        """Whether the memory needed is not above a GPU's."""
        return self.memory is None or self.hardware.gpu_bytes is None or self.memory.total <= self.hardware.gpu_bytes


def estimate(plan: Plan, name: str, last: Manifest | None, machine: Machine, library: ModelLibrary) -> Estimate:
    """Estimate one stage.

    `last`: manifest of the last artifact of the stage with this name, whatever its digest. `machine`: where a stage
    without GPUs runs. `library`: looks up the models that the run starts from.
    """
    stage = plan.stages[name].stage
    hardware, config = hardware_of(stage, machine), stage.config
    tokens = _num_tokens(config, last)
    try:
        shape: ModelShape | None = model_shape(plan, name, library)
        reason = ""
    except UnknownSize as error:
        shape, reason = None, f"the size of its model is unknown: {error}"
    memory = None
    if shape is not None and isinstance(config, Training) and hardware.num_gpus:
        memory = gpu_memory(shape, config, hardware.num_gpus)
    # A time on cores is no evidence for GPUs.
    if last is not None and bool(last.gpu_seconds) == bool(hardware.num_gpus):
        return Estimate(hardware, tokens, _scaled(last, tokens), memory)
    if not isinstance(config, Training | ExportStage):
        return Estimate(hardware, tokens, None, memory, "it depends on the size of its data; known after a first run")
    if isinstance(config, PpoStage):
        return Estimate(hardware, tokens, None, memory, "it depends on the lengths of the answers")
    if shape is None:
        return Estimate(hardware, tokens, None, memory, reason)
    flops = stage_flops(shape, config, tokens)
    if flops is None:
        why = "its tokens depend on the data; set `budget.tokens`, or run it once"
        return Estimate(hardware, tokens, None, memory, why)
    return Estimate(hardware, tokens, START_SECONDS + flops / hardware.total_flops, memory)


def _num_tokens(config: StageConfig, last: Manifest | None) -> int | None:
    planned = config.planned_tokens()
    return planned if planned is not None or last is None else last.tokens or None


def _scaled(last: Manifest, tokens: int | None) -> float:
    """Return the last time, of which all but the start is proportional to the tokens."""
    scale = tokens / last.tokens if tokens and last.tokens else 1.0
    fixed = min(START_SECONDS, last.seconds)
    return fixed + (last.seconds - fixed) * scale


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def stage_flops(shape: ModelShape, config: Training | ExportStage, tokens: int | None) -> float | None:
    """Return the FLOPs of a stage; None if that depends on its data."""
    if isinstance(config, ExportStage):
        return EXPORT_PASSES * config.proof.tokens * forward_flops(shape, config.proof.tokens)
    if tokens is None:
        return None
    per_token = training_flops(shape, config)
    # The reference scores every answer once, if it is a model of its own.
    per_token += forward_flops(shape, config.sequence_length) if isinstance(config, DpoStage) else 0.0
    return tokens * per_token


def forward_flops(shape: ModelShape, length: int) -> float:
    """Return the FLOPs of a forward pass per token: 2 for each parameter, and attention's 4 L D T.

    A third of PaLM's 6 N + 12 L H Q T, with H Q = D (arXiv 2204.02311, appendix B).
    """
    return 2 * shape.multiplied + 4 * shape.layers * shape.hidden * length


def training_flops(shape: ModelShape, config: Training) -> float:
    """Return the FLOPs of a training step per token.

    A forward pass, the gradients of activations, which cost as much, and the gradients of the weights that are trained:
    6 N + 12 L D T if all are (arXiv 2204.02311, appendix B). Frozen matrices need no gradient of their weights, so that
    LoRA costs 4 N and little more. Gradient checkpointing makes the forward pass twice.
    """
    length = config.sequence_length
    forward = forward_flops(shape, length)
    passes = 3 if config.gradient_checkpointing else 2
    attention_of_weights = 4 * shape.layers * shape.hidden * length  # both factors of its products are activations
    adapters = 0.0 if config.trainable.lora is None else trained_parameters(shape, config)
    return passes * (forward + 2 * adapters) + attention_of_weights + 2 * _weight_gradients(shape, config)


def _weight_gradients(shape: ModelShape, config: Training) -> float:
    """Return the parameters that get a gradient by a product for each token."""
    if config.trainable.full is not None:
        return shape.multiplied
    if config.trainable.embeddings is not None:
        return shape.embedding  # the head's; the embedding only adds up
    return trained_parameters(shape, config)


def trained_parameters(shape: ModelShape, config: Training) -> float:
    """Return the number of parameters that are trained."""
    lora = config.trainable.lora
    if config.trainable.full is not None:
        return shape.parameters
    if lora is None:
        return shape.embedding * (1 if shape.tied else 2)
    saved = sum(name in ("embed_tokens", "lm_head") for name in lora.modules_to_save)
    return shape.lora_parameters(lora.targets, lora.rank) + saved * shape.embedding


# -- memory ------------------------------------------------------------------------------------------------------------


def gpu_memory(shape: ModelShape, config: Training, gpus: int) -> GpuMemory:
    """Return the memory on each GPU: weights, gradients and optimizer states as ZeRO's stage divides them (arXiv
    1910.02054, figure 1), and activations of a micro-batch (arXiv 2205.05198)."""
    zero, trained = config.sharding.zero if gpus > 1 else 0, trained_parameters(shape, config)
    mixed = config.precision is not Precision.FP32
    weights = shape.parameters * (2 if mixed else 4) / (gpus if zero >= 3 else 1)
    if config.sharding.offload_parameters is Offload.CPU:
        weights = 0.0
    gradients = trained * GRADIENT_BYTES / (gpus if zero >= 2 else 1)
    states = trained * (MOMENT_BYTES + (MASTER_BYTES if mixed else 0)) / (gpus if zero >= 1 else 1)
    if config.sharding.offload_optimizer is Offload.CPU:
        states = 0.0
    units = config.sequence_length * (config.batch.micro_batch_rows or 1) * shape.hidden * (1 if mixed else 2)
    whole = units * ACTIVATION_BYTES
    if config.gradient_checkpointing:
        return GpuMemory(weights, gradients, states, units * CHECKPOINT_BYTES * shape.layers + whole)
    return GpuMemory(weights, gradients, states, whole * shape.layers)


# -- several stages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """The sum of the known estimates of several stages."""

    tokens: int
    seconds: float
    gpu_hours: float
    complete: bool
    """Whether every stage's time is known."""


def total(estimates: Collection[Estimate]) -> Total:
    """Return the sum of estimates."""
    return Total(
        tokens=sum(item.tokens or 0 for item in estimates),
        seconds=sum(item.seconds or 0.0 for item in estimates),
        gpu_hours=sum(item.gpu_hours or 0.0 for item in estimates),
        complete=all(item.seconds is not None for item in estimates),
    )
