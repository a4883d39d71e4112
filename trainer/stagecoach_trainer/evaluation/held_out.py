"""Loss on text the model has not seen: nats per token, bits per character, and the perplexities of both.

The rows are those that training stages measure on, so their figures and these can be compared. Conversations are scored
as they would be served: what the assistant says, end token included, given everything before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stagecoach_api.conversation import Loss
from stagecoach_api.kinds.evaluate import EvaluateStage
from stagecoach_api.references import NamedSource
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.loop.job import HeldOutSet
from stagecoach_trainer.loop.measure import LossSum, measure
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.datasets import conversation_held_out, is_conversation, text_held_out

SLICE_BATCHES = 8
"""Micro-batches measured between two reports of progress."""


@dataclass(frozen=True)
class HeldOutFigures:
    """What a set came to."""

    metrics: dict[str, float]
    """`heldOut.<name>.<metric>`."""

    counts: dict[str, int]
    """Tokens and characters behind them."""


def measure_held_out(
    source: NamedSource,
    config: EvaluateStage,
    model: Any,
    tokenizer: Any,
    context: StageContext,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutFigures:
    """Measure one set. Raises UserError where nothing of it can be measured."""
    held_out = _read(source, config, tokenizer, context)
    found = _measure_in_slices(model, held_out.rows, config.batch_rows, report)
    if not math.isfinite(found.nll):
        raise UserError(
            f"heldOut {source.name}: the loss is no number; try `precision: fp32`, else the model is broken"
        )
    counts = {"tokens": found.tokens, "characters": held_out.characters}
    return HeldOutFigures(figures(source.name, found, held_out.characters), counts)


def _read(source: NamedSource, config: EvaluateStage, tokenizer: Any, context: StageContext) -> HeldOutSet:
    length, most = config.sequence_length, config.max_tokens
    if not is_conversation(context, source):
        return text_held_out(context, source, tokenizer, length, most)
    if tokenizer.chat_template is None:
        raise UserError(f"heldOut {source.name}: conversations need a chat template; name the stage's `template`")
    return conversation_held_out(context, source, tokenizer, Loss(), length, most)


def figures(name: str, found: LossSum, characters: int) -> dict[str, float]:
    """Return the metrics of a set under the names gates use."""
    per_character = LossSum(found.nll, characters)
    return {
        f"heldOut.{name}.loss": found.loss,
        f"heldOut.{name}.perplexity": found.perplexity,
        f"heldOut.{name}.bitsPerCharacter": found.bits_per_character(characters),
        f"heldOut.{name}.perplexityPerCharacter": per_character.perplexity,
        f"heldOut.{name}.tokensPerCharacter": found.tokens / characters,
    }


def _measure_in_slices(model: Any, rows: Sequence[Row], batch_rows: int, report: Callable[[int, int], None]) -> LossSum:
    nll, tokens = 0.0, 0
    step = SLICE_BATCHES * batch_rows
    for start in range(0, len(rows), step):
        found = measure(model, rows[start : start + step], batch_rows)
        nll, tokens = nll + found.nll, tokens + found.tokens
        report(min(start + step, len(rows)), len(rows))
    return LossSum(nll, tokens)
