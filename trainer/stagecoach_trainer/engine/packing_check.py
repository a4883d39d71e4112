"""The packing canary: before a packed row is trained on, prove on this very model that its samples do not see each
other.

Whether they do depends on the attention implementation, the mask and the cache (position ids separate samples only
with neither mask nor cache), and a leak shows in no loss curve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.kernels.causal import CausalLoss, causal_model
from stagecoach_trainer.runtime.errors import UserError

LONGEST = 512
"""Tokens of each of the two samples that are looked at."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative change that rounding may make. Leaks of small models without training were 0.002 to 0.08 (BLOOM,
OPT)."""


def check_packing(loss: CausalLoss, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> float | None:
    """Return what one sample of a packed row does to another, as `leak_of`. Raises UserError where that is no rounding.

    `dtype`: the number format that the model computes in.
    """
    leak = leak_of(loss, rows, device)
    if leak is not None and not leak <= TOLERANCES[dtype]:
        raise UserError(
            f"packed samples see each other: changing one sample moved another's hidden states by {leak:.2g} "
            f"(allowed {TOLERANCES[dtype]:.0e}); this model's attention cannot be packed: in `sft` set "
            "`packing: false`; elsewhere rows of text need a model that can"
        )
    return leak


def samples_apart(loss: CausalLoss, rows: Sequence[Row], device: torch.device) -> Sequence[Row]:
    """Return rows of which no sample sees another: as they are, or one for each sample where packed ones leak."""
    leak = leak_of(loss, rows, device)
    if leak is None or leak <= TOLERANCES[_computed_in(loss, device)]:
        return rows
    return [sample for row in rows for sample in row.samples()]


def leak_of(loss: CausalLoss, rows: Sequence[Row], device: torch.device) -> float | None:
    """Change the first sample of a packed row and look whether the second one's hidden states move.

    Returns the largest relative change; None where no row is packed. A model is looked at once.
    """
    packed = next((row for row in rows if len(row.lengths) > 1), None)
    if packed is None:
        return None
    if loss.leak is None:
        loss.leak = _leak_in(loss, packed, device)
    return loss.leak


def _leak_in(loss: CausalLoss, packed: Row, device: torch.device) -> float:
    row, first = _first_two(packed)
    vocabulary = int(causal_model(loss.model).config.vocab_size)
    changed = row.tokens.copy()
    changed[:first] = (changed[:first] + 1) % vocabulary
    other = Row(changed, row.labels, row.lengths)
    was_training = loss.training
    loss.eval()
    try:
        with torch.no_grad():
            expected = loss.hidden(collate([row]).to(device))[0, first:].float()
            got = loss.hidden(collate([other]).to(device))[0, first:].float()
    finally:
        loss.train(was_training)
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _computed_in(loss: CausalLoss, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return min((item.dtype for item in loss.parameters() if item.dtype in TOLERANCES), key=lambda dtype: dtype.itemsize)


def _first_two(row: Row) -> tuple[Row, int]:
    """Return a row of the row's first two samples, each cut to LONGEST, and the length of the first."""
    first, second = row.lengths[:2]
    kept_first, kept_second = min(first, LONGEST), min(second, LONGEST)
    start = first - kept_first
    part = slice(start, first + kept_second)
    return Row(row.tokens[part], row.labels[part], (kept_first, kept_second)), kept_first
