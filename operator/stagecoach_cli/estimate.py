"""Estimates of a stage's training tokens and time, from its last run or else from the size of its model.

The estimates are rough, are shown as such (`~`), and no decision depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from stagecoach_api.artifacts import Manifest
from stagecoach_api.references import Reference
from stagecoach_api.spec import Stage
from stagecoach_core.values import Plan

START_SECONDS = 20.0
"""Time from starting a process that imports torch to its first step."""

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""Forward and backward pass (arXiv 2001.08361, section 2.1)."""

CPU_CORE_FLOPS = 4e10
"""Throughput of one core with a small model in fp32 or bf16, measured on this project's demo."""

GPU_UTILISATION = 0.4
"""Model FLOPs utilisation (MFU) of training."""

GPU_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12}
"""Peak dense bf16 FLOP/s (V100: fp16) from NVIDIA's data sheets, by a substring of the product's name."""

_SIZE_IN_NAME = re.compile(r"(?<![a-z0-9])(\d+(?:\.\d+)?)\s?([bm])(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a stage."""

    tokens: int | None = None
    """Training tokens; None for other stages, and if they depend on data that does not exist yet."""
    seconds: float | None = None
    """None if unknown."""


def estimate(plan: Plan, name: str, last: Manifest | None, cores: int) -> Estimate:
    """Estimate one stage.

    `last`: manifest of the last artifact of the stage with this name, whatever its digest. `cores`: CPU cores of the
    machine, for a stage without GPUs.
    """
    stage = plan.stages[name].stage
    tokens = stage.config.planned_tokens()
    if tokens is None and last is not None and last.tokens:
        tokens = last.tokens
    if last is not None:
        scale = tokens / last.tokens if tokens and last.tokens else 1.0
        fixed = min(START_SECONDS, last.seconds)
        return Estimate(tokens, fixed + (last.seconds - fixed) * scale)
    parameters = num_parameters(plan, name)
    if tokens is None or parameters is None:
        return Estimate(tokens, None)
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens
    return Estimate(tokens, START_SECONDS + flops / _flops_per_second(stage, cores))


def num_parameters(plan: Plan, name: str) -> float | None:
    """Return the number of parameters of a stage's model; None if the run file does not determine it."""
    config = plan.stages[name].stage.config
    vocabulary: Reference | None = getattr(config, "tokenizer", None)
    new = config.new_model_parameters(_vocabulary_size(plan, vocabulary.stage if vocabulary is not None else None))
    if new is not None:
        return new
    model: Reference | None = getattr(config, "model", None)
    if model is None:
        return None
    return _size_in_name(model.uri or "") if model.stage is None else num_parameters(plan, model.stage)


def _vocabulary_size(plan: Plan, name: str | None) -> int:
    """Return the largest possible size of a stage's vocabulary, as far as the run file sets it."""
    if name is None:
        return 0
    config = plan.stages[name].stage.config
    base: Reference | None = getattr(config, "base", None)
    return config.new_vocabulary_size() + _vocabulary_size(plan, base.stage if base is not None else None)


def _size_in_name(uri: str) -> float | None:
    """Return the number of parameters in a model's name, such as 7e9 for `llama-7b`."""
    found = _SIZE_IN_NAME.findall(uri.rstrip("/").rsplit("/", 1)[-1])
    if not found:
        return None
    number, unit = found[-1]
    return float(number) * (1e9 if unit.lower() == "b" else 1e6)


def _flops_per_second(stage: Stage, cores: int) -> float:
    product = stage.resources.gpu_product or ""
    peak = next((peak for part, peak in GPU_PEAK_FLOPS.items() if part in product), None)
    gpus = stage.resources.num_nodes * (stage.resources.gpus_per_node or 0)
    if peak is not None and gpus:
        return peak * GPU_UTILISATION * gpus
    return CPU_CORE_FLOPS * cores


@dataclass(frozen=True)
class Total:
    """The sum of the known estimates of several stages."""

    tokens: int
    seconds: float
    complete: bool
    """Whether every stage's time is known."""


def total(estimates: Collection[Estimate]) -> Total:
    """Return the sum of estimates."""
    return Total(
        tokens=sum(item.tokens or 0 for item in estimates),
        seconds=sum(item.seconds or 0.0 for item in estimates),
        complete=all(item.seconds is not None for item in estimates),
    )
