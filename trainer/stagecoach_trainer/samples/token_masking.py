"""Hiding random input tokens, so that a model cannot lean on the answers in front of the one it learns.

Chain of hindsight (arXiv 2302.02676) hides 0 to 5 % of the past tokens from attention while training, after forgetful
causal masking (arXiv 2210.13432). Here a hidden token is read as another one, the vocabulary's unknown token, which any
attention kernel can do; targets stay what they are. What is hidden is a pure function of (seed, step, row), so a
resumed run hides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stagecoach_trainer.batches.mixing import make_key, splitmix
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.plan import MixedPlan, PlannedPhase

KEY_MASK = 0x48494445
MEASURED_STEPS = 32


def filler_token(tokenizer: Any) -> int:
    """Return the id that stands for a hidden token: the vocabulary's unknown token, else that for padding, else the
    one that ends a text. Raises UserError for a vocabulary with none of them."""
    for found in (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise UserError("hindsight.maxMaskedShare: the tokenizer has no unknown, padding or end token to hide others by")


@dataclass(frozen=True)
class TokenMasking:
    """Hides a share of each row's input tokens; the share is drawn for each row, evenly from 0 to `max_share`."""

    max_share: float
    filler: int
    seed: int

    def hidden(self, lengths: Sequence[int], step: int, number: int) -> npt.NDArray[np.bool_]:
        """Return which tokens of row `number` of a step are hidden [T]; never the first of a sample."""
        key = np.uint64(make_key(self.seed, KEY_MASK, step, number))
        random = splitmix(np.arange(1 + sum(lengths), dtype=np.uint64) ^ key) >> np.uint64(11)
        evenly = random.astype(np.float64) * 2.0**-53
        hidden: npt.NDArray[np.bool_] = evenly[1:] < evenly[0] * self.max_share
        hidden[np.cumsum([0, *lengths[:-1]])] = False
        return hidden

    def hide(self, row: Row, step: int, number: int) -> Row:
        """Return a row with the filler in the place of hidden tokens; its labels stay."""
        hidden = self.hidden(row.lengths, step, number)
        return replace(row, tokens=np.where(hidden, np.int32(self.filler), row.tokens).astype(np.int32))


@dataclass(frozen=True)
class MaskedPhase(PlannedPhase):
    """A phase whose rows have hidden tokens."""

    hiding: TokenMasking

    def rows(self, step: int) -> list[Row]:
        shown = super().rows(step)
        return [self.hiding.hide(row, self.first_step + step, number) for number, row in enumerate(shown)]


def mask_phases(phases: Sequence[PlannedPhase], hiding: TokenMasking) -> list[PlannedPhase]:
    """Return the phases of a plan with hidden tokens in all their rows."""
    return [
        MaskedPhase(**{field.name: getattr(phase, field.name) for field in fields(phase)}, hiding=hiding)
        for phase in phases
    ]


def masked_share(plan: MixedPlan, hiding: TokenMasking) -> float:
    """Return the share of input tokens that is hidden, over at most `MEASURED_STEPS` steps spread over the plan."""
    steps = np.unique(np.linspace(0, plan.num_steps - 1, MEASURED_STEPS).astype(int))
    masks = [
        hiding.hidden(row.lengths, int(step), number)
        for step in steps
        for number, row in enumerate(plan.rows(int(step)))
    ]
    return float(np.concatenate(masks).mean())
