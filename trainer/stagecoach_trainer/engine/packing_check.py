"""The packing check: before the first step on packed rows, prove on the model itself that samples of a row do not see
each other.

Whether they do depends on the attention implementation, the mask and the cache (position ids separate samples only
without mask and cache), and a leak does not show in the loss curve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import Row
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.runtime.errors import UserError

LONGEST = 512
"""Upper limit of the tokens of each of the two samples that are compared."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
"""Largest relative change attributed to rounding. Measured: exactly 0 in all three for the 100 architectures that do
not leak (LLaMA, Qwen, Mixtral, GPT-2), as the other sample takes no part in any sum; at least 0.002 for those that
leak, even untrained (BLOOM, OPT, Mamba)."""


def check_packing(loss: CausalLoss, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the influence of one sample of a packed row on another, as `leak_of`; None if no row is packed.

    `dtype`: the dtype in which the model computes. Raises UserError if the influence exceeds rounding.
    """
    leak = leak_of(loss, rows, device)
    if leak is not None and not leak <= TOLERANCES[dtype]:  # not `>`: NaN counts as a leak
        raise UserError(
            f"packed samples see each other: changing one sample moved another's hidden states by {leak:.2g} "
            f"(allowed {TOLERANCES[dtype]:.0e}); this model's attention does not support packing: in `sft` set "
            "`packing: false`; other stages need another model"
        )
    return leak


def samples_apart(loss: CausalLoss, rows: Sequence[Row], device: torch.device) -> Sequence[Row]:
    """Return rows whose samples do not see each other: `rows`, or one row per sample if packed ones leak."""
    leak = leak_of(loss, rows, device)
    if leak is None or leak <= TOLERANCES[computed_in(loss, device)]:
        return rows
    return [sample for row in rows for sample in row.samples()]


def leak_of(loss: CausalLoss, rows: Sequence[Row], device: torch.device) -> float | None:
    """Change the first sample of a packed row and compare the second one's hidden states.

    Returns their largest relative change; None if no row is packed. A model is checked once; the result is kept.
    """
    packed = next((row for row in rows if len(row.lengths) > 1), None)
    if packed is None:
        return None
    if loss.leak is None:
        loss.leak = _leak_in(loss, packed, device)
    return loss.leak


def _leak_in(loss: CausalLoss, packed: Row, device: torch.device) -> float:
    row, first = _first_two(packed)
    vocabulary = loss.vocabulary
    changed = row.tokens.copy()
    changed[:first] = (changed[:first] + 1) % vocabulary  # every token of the first sample becomes another one
    other = Row(changed, row.labels, row.lengths)
    # Dropout would change the hidden states as well.
    was_training = loss.training
    loss.eval()
    try:
        with torch.no_grad():
            expected = loss.hidden(collate([row]).to(device))[0, first:].float()
            got = loss.hidden(collate([other]).to(device))[0, first:].float()
    finally:
        loss.train(was_training)
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def computed_in(loss: CausalLoss, device: torch.device) -> torch.dtype:
    """Return the dtype in which a module computes, autocast included."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return min((item.dtype for item in loss.parameters() if item.dtype in TOLERANCES), key=lambda dtype: dtype.itemsize)


def _first_two(row: Row) -> tuple[Row, int]:
    """Return a row of the row's first two samples, each cut to LONGEST tokens, and the length of the first.

    The first keeps its end and the second its beginning, so they stay adjacent.
    """
    first, second = row.lengths[:2]
    kept_first, kept_second = min(first, LONGEST), min(second, LONGEST)
    start = first - kept_first
    part = slice(start, first + kept_second)
    return Row(row.tokens[part], row.labels[part], (kept_first, kept_second)), kept_first
