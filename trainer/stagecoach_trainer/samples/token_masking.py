"""Mask random input tokens, so that a model cannot copy from the earlier answers of a chain.

Chain of hindsight (arXiv 2302.02676) masks 0 to 5 % of the past tokens in attention during training, following
forgetful causal masking (arXiv 2210.13432). Here a masked token is replaced with a filler, the vocabulary's unknown
token, which works with any attention kernel; targets do not change. The mask is a pure function of (seed, step, row),
so a resumed run masks the same tokens.
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
    """Return the id that replaces masked tokens: the vocabulary's unknown, padding or EOS token, the first it has.

    Raises UserError for a vocabulary with none of them.
    """
    for token in (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("hindsight.maxMaskedShare: the tokenizer has no unknown, padding or end token to mask with")


@dataclass(frozen=True)
class TokenMasking:
    """Masks a share of each row's input tokens; the share is drawn per row, uniformly from 0 to `max_share`."""

    max_share: float
    filler: int
    seed: int

    def mask(self, lengths: Sequence[int], step: int, number: int) -> npt.NDArray[np.bool_]:
        """Return whether each token of row `number` of a step is masked [T]; the first of a sample never is."""
        key = np.uint64(make_key(self.seed, KEY_MASK, step, number))
        # One random number per token, after one for the row: 53 bits each, as a double's significand has.
        random = splitmix(np.arange(1 + sum(lengths), dtype=np.uint64) ^ key) >> np.uint64(11)
        uniform = random.astype(np.float64) * 2.0**-53
        masked: npt.NDArray[np.bool_] = uniform[1:] < uniform[0] * self.max_share
        # Each sample keeps its first token, usually BOS, on which attention relies (arXiv 2309.17453).
        masked[np.cumsum([0, *lengths[:-1]])] = False
        return masked

    def apply(self, row: Row, step: int, number: int) -> Row:
        """Return a row in which the filler replaces masked tokens; its labels do not change."""
        masked = self.mask(row.lengths, step, number)
        return replace(row, tokens=np.where(masked, np.int32(self.filler), row.tokens).astype(np.int32))


@dataclass(frozen=True)
class MaskedPhase(PlannedPhase):
    """A phase whose rows have masked tokens."""

    masking: TokenMasking

    def rows(self, step: int) -> list[Row]:
        # Keyed by the step of the whole plan, so that phases with the same rows mask them differently.
        rows = super().rows(step)
        return [self.masking.apply(row, self.first_step + step, number) for number, row in enumerate(rows)]


def mask_phases(phases: Sequence[PlannedPhase], masking: TokenMasking) -> list[PlannedPhase]:
    """Return the phases of a plan with masked tokens in all their rows."""
    return [
        MaskedPhase(**{field.name: getattr(phase, field.name) for field in fields(phase)}, masking=masking)
        for phase in phases
    ]


def masked_share(plan: MixedPlan, masking: TokenMasking) -> float:
    """Return the share of masked input tokens in at most `MEASURED_STEPS` steps spread over the plan."""
    steps = np.unique(np.linspace(0, plan.num_steps - 1, MEASURED_STEPS).astype(int))
    masks = [
        masking.mask(row.lengths, int(step), number)
        for step in steps
        for number, row in enumerate(plan.rows(int(step)))
    ]
    return float(np.concatenate(masks).mean())
