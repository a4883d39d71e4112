"""How many tokens and how much time a plan asks for, as far as that can be said before it runs.

Tokens come from budgets and phases. Time comes from what the same stage took before, or from tokens and a stated FLOP
rate: 6 FLOPs per parameter and token for a training step, 2 of them for the forward pass (arXiv 2001.08361, section
2.1), 4 where the body is frozen and its weights need no gradient, 2 more where activations are recomputed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stagecoach_api.artifacts import Manifest
from stagecoach_api.references import Reference
from stagecoach_api.stages import EvaluateStage, ExportStage, PretrainStage, SftStage, TokenizerStage
from stagecoach_api.stages.pretrain import Architecture
from stagecoach_api.training import Training
from stagecoach_core.policies.capacity import num_ranks
from stagecoach_core.values import Plan, PlannedStage


@dataclass(frozen=True)
class Past:
    """What a stage took before."""

    tokens: int
    """Training tokens; 0 for a stage that does not train."""
    seconds: float
    """Wall-clock seconds of all attempts."""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage asks for. None: it cannot be said."""

    tokens: int | None = None
    """Training tokens; 0 for a stage that does not train."""
    tokens_from: str = ""
    """What that rests on."""
    seconds: float | None = None
    """Wall-clock seconds."""
    seconds_from: str = ""
    """What that rests on."""


def past_of(manifest: Manifest) -> Past:
    """Return what the stage behind an artifact took."""
    return Past(manifest.tokens, manifest.seconds)


def estimate(
    plan: Plan,
    past: Mapping[str, Past] | None = None,
    flops_per_rank: float | None = None,
    parameters: Mapping[str, int] | None = None,
) -> dict[str, StageEstimate]:
    """Return an estimate for every stage, by name, in the plan's order.

    `past`: what stages took before, by name. `flops_per_rank`: FLOPs per second one rank really does. `parameters`:
    sizes of models from outside the run, by `Reference.key`.
    """
    before = past or {}
    estimates: dict[str, StageEstimate] = {}
    for name, planned in plan.stages.items():
        tokens, tokens_from = _tokens(planned, before.get(name))
        size = num_parameters(plan, name, parameters or {})
        seconds, seconds_from = _seconds(planned, before.get(name), tokens, size, flops_per_rank)
        estimates[name] = StageEstimate(tokens, tokens_from, seconds, seconds_from)
    return estimates


def longest_path_seconds(plan: Plan, estimates: Mapping[str, StageEstimate], done: Collection[str]) -> float | None:
    """Return the time of the slowest chain of stages that are not `done`, given room for all that can run at once.

    None: for one of them nothing is known.
    """
    ends: dict[str, float] = {}
    for name, planned in plan.stages.items():
        seconds = 0.0 if name in done else estimates[name].seconds
        if seconds is None:
            return None
        ends[name] = seconds + max((ends[key] for key in planned.upstream), default=0.0)
    return max(ends.values(), default=0.0)


# -- tokens ------------------------------------------------------------------------------------------------------------


def _tokens(planned: PlannedStage, past: Past | None) -> tuple[int | None, str]:
    config = planned.stage.config
    if not isinstance(config, Training):
        return 0, ""
    if isinstance(config, PretrainStage) and config.phases:
        return sum(phase.tokens for phase in config.phases), "phases"
    return _budget_tokens(config, past)


def _budget_tokens(config: Training, past: Past | None) -> tuple[int | None, str]:
    budget, batch = config.budget, config.batch
    if budget.tokens is not None:
        return budget.tokens, "budget"
    if budget.steps is not None and batch.tokens is not None:
        rows = max(1, batch.tokens // config.sequence_length)
        return budget.steps * rows * config.sequence_length, "budget.steps × batch"
    if past is not None and past.tokens > 0:
        return past.tokens, "last time"
    if budget.steps is not None and batch.samples is not None:
        return budget.steps * batch.samples * config.sequence_length, "budget.steps × batch, at most"
    return None, "the data decides"


# -- time --------------------------------------------------------------------------------------------------------------


def _seconds(
    planned: PlannedStage, past: Past | None, tokens: int | None, size: int | None, flops_per_rank: float | None
) -> tuple[float | None, str]:
    if past is not None and past.seconds > 0:
        if tokens and past.tokens > 0:
            return past.seconds * tokens / past.tokens, f"{past.tokens / past.seconds:.0f} tokens/s last time"
        return past.seconds, "last time"
    config = planned.stage.config
    if tokens and size and flops_per_rank and isinstance(config, Training):
        ranks = num_ranks(planned.stage.resources)
        flops = flops_per_token(config) * size * tokens
        return flops / (flops_per_rank * ranks), f"{flops:.2g} FLOPs at {flops_per_rank * ranks:.2g}/s"
    return None, "not known before it has run once"


def flops_per_token(config: Training) -> int:
    """Return the FLOPs per parameter and token of a training step."""
    frozen_body = config.trainable.full is None
    return (4 if frozen_body else 6) + (2 if config.gradient_checkpointing else 0)


# -- sizes -------------------------------------------------------------------------------------------------------------


def num_parameters(plan: Plan, name: str, known: Mapping[str, int]) -> int | None:
    """Return the size of the model a stage works on, following `model` up to its architecture. None: not known.

    `known`: sizes of models from outside, by `Reference.key`.
    """
    config = plan.stages[name].stage.config
    if isinstance(config, PretrainStage) and config.architecture is not None:
        vocabulary = num_pieces(plan, config.tokenizer)
        return None if vocabulary is None else architecture_parameters(config.architecture, vocabulary)
    if not isinstance(config, PretrainStage | SftStage | EvaluateStage | ExportStage) or config.model is None:
        return None
    if config.model.stage is None:
        return known.get(config.model.key)
    return num_parameters(plan, config.model.stage, known)


def num_pieces(plan: Plan, reference: Reference | None) -> int | None:
    """Return the size of a vocabulary that a stage of the run trains from nothing. None: not known."""
    if reference is None or reference.stage is None:
        return None
    config = plan.stages[reference.stage].stage.config
    if isinstance(config, TokenizerStage) and config.base is None and config.train is not None:
        return config.train.vocab_size
    return None


def architecture_parameters(shape: Architecture, num_pieces: int) -> int:
    """Return the number of parameters of a LLaMA decoder with a vocabulary of `num_pieces`."""
    width = shape.hidden_size
    key_value_width = width // shape.num_heads * (shape.num_key_value_heads or shape.num_heads)
    attention = 2 * width * width + 2 * width * key_value_width
    feed_forward = 3 * width * shape.intermediate_size
    block = attention + feed_forward + 2 * width  # two norms
    embeddings = num_pieces * width * (1 if shape.tie_embeddings else 2)
    return shape.num_layers * block + embeddings + width
