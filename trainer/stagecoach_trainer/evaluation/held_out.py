"""Loss on held-out text: nats per token, bits per character, and the perplexities of both.

The rows are built as the training stages build theirs, so figures are comparable. In conversations the assistant's
turns, end tokens included, are scored given everything before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stagecoach_api.conversation import Loss
from stagecoach_api.kinds.evaluate import EvaluateStage
from stagecoach_api.references import NamedSource
from stagecoach_trainer.loop.job import HeldOutSet
from stagecoach_trainer.loop.measure import LossSum, measure
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.datasets import LOST_SAMPLES, conversation_held_out, is_conversation, text_held_out


@dataclass(frozen=True)
class HeldOutFigures:
    """The figures of one set."""

    metrics: dict[str, float]
    """`heldOut.<name>.<metric>`."""

    counts: dict[str, int]
    """Numbers of tokens and characters over which they are computed, and of samples left out."""


def measure_held_out(
    source: NamedSource,
    config: EvaluateStage,
    model: Any,
    tokenizer: Any,
    context: StageContext,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutFigures:
    """Measure one set. Raises UserError if it has nothing to measure, or the loss is NaN or infinite."""
    held_out = _read(source, config, tokenizer, context)
    rows = len(held_out.rows)
    found = measure(
        model, held_out.rows, config.batch_rows, report=lambda done, total: report(rows * done // total, rows)
    )
    if not math.isfinite(found.nll):
        raise UserError(
            f"heldOut {source.name}: the loss is NaN or infinite; try `precision: fp32`; if that fails, the model's "
            "weights are damaged"
        )
    left_out = {name: held_out.counts[name] for name in LOST_SAMPLES if held_out.counts.get(name)}
    counts = {"tokens": found.tokens, "characters": held_out.characters, **left_out}
    return HeldOutFigures(figures(source.name, found, held_out.characters), counts)


def _read(source: NamedSource, config: EvaluateStage, tokenizer: Any, context: StageContext) -> HeldOutSet:
    length, most = config.sequence_length, config.max_tokens
    if not is_conversation(context, source):
        return text_held_out(context, source, tokenizer, length, most)
    if tokenizer.chat_template is None:
        raise UserError(f"heldOut {source.name}: conversations need a chat template; set the stage's `template`")
    return conversation_held_out(context, source, tokenizer, Loss(), length, most, config.max_dropped_share)


def figures(name: str, found: LossSum, characters: int) -> dict[str, float]:
    """Return the metrics of a set by the names that gates use."""
    per_character = LossSum(found.nll, characters)
    return {
        f"heldOut.{name}.loss": found.loss,
        f"heldOut.{name}.perplexity": found.perplexity,
        f"heldOut.{name}.bitsPerCharacter": found.bits_per_character(characters),
        f"heldOut.{name}.perplexityPerCharacter": per_character.perplexity,
        f"heldOut.{name}.tokensPerCharacter": found.tokens / characters,
    }
