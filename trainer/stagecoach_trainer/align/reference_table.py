"""Log-probabilities of answers under the reference, computed once and kept.

They are computed in windows of sequences; a window's result is a file `cache/references/<digest>.npy`, named by what it
was made of, so that a resumed attempt finds the very same numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stagecoach_api.artifacts import digest_of
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.samples.groups import TokenSequence

VERSION = 2
"""Raised when the code would compute other numbers from the same input."""

WINDOW = 1024
"""Sequences whose results are kept in one file."""

Scorer = Callable[[Sequence[TokenSequence]], Tensor]
"""Returns the log-probability of each sequence's answer, fp64 [N], the same on every rank."""


def key_of(sequence: TokenSequence) -> bytes:
    """Return what names a sequence: its tokens, and where the answer begins."""
    content = np.ascontiguousarray(sequence.ids, np.int32).tobytes()
    return hashlib.blake2b(content, digest_size=16, salt=sequence.num_prompt.to_bytes(8, "little")).digest()


def windows(sequences: Iterable[TokenSequence], size: int = WINDOW) -> Iterator[list[TokenSequence]]:
    """Yield the sequences, each once, in lists of at most `size`."""
    seen: set[bytes] = set()
    window: list[TokenSequence] = []
    for sequence in sequences:
        key = key_of(sequence)
        if key in seen:
            continue
        seen.add(key)
        window.append(sequence)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


class ReferenceTable:
    """Log-probabilities by sequence."""

    def __init__(self) -> None:
        self._values: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._values)

    def put(self, sequences: Sequence[TokenSequence], log_probs: Tensor) -> None:
        """Add sequences with their log-probabilities [N]."""
        self._values.update(zip(map(key_of, sequences), log_probs.tolist(), strict=True))

    def of(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Return the log-probabilities, fp64 [N]. Raises KeyError for a sequence that was never put."""
        return torch.tensor([self._values[key_of(item)] for item in sequences], dtype=torch.float64)


def fill_table(
    table: ReferenceTable,
    context: StageContext,
    key: Mapping[str, Any],
    sequences: Iterable[TokenSequence],
    scorer: Callable[[], Scorer],
) -> None:
    """Put all sequences into the table, from the cache or by the scorer, which is made when it is first needed.

    Args:
        key: What the numbers depend on beside the sequences: the reference and how it is computed.

    Raises Interrupted, on all ranks, when any of them is asked to stop (what is finished is kept), and UserError where
    the reference gives no numbers.
    """
    done = 0
    for window in windows(sequences):
        _stop_together(context)
        content = hashlib.sha256(b"".join(map(key_of, window))).hexdigest()
        path = context.cache / "references" / f"{digest_of({'version': VERSION, **key, 'sequences': content})}.npy"
        found = _kept(context, path, len(window))
        if found is None:
            found = scorer()(window)
            _require_numbers(found)
            if context.world.local_rank == 0:
                _keep(path, found)
        table.put(window, found)
        done += len(window)
        context.progress.report("score with the reference", done, unit="answers")


def _require_numbers(found: Tensor) -> None:
    if not bool(found.isfinite().all()):
        raise UserError(
            f"reference: the log-probabilities of {int((~found.isfinite()).sum())} of {len(found)} answers are no "
            "numbers; the model is damaged, or its weights overflow in this `precision` (try `bf16` or `fp32`)"
        )


def _stop_together(context: StageContext) -> None:
    stop = torch.tensor([float(context.stop.is_set())])
    if context.world.size > 1:
        dist.all_reduce(stop)
    if stop.item():
        raise Interrupted("asked to stop while the reference scores the answers; finished parts are kept")


def _kept(context: StageContext, path: Path, length: int) -> Tensor | None:
    """Return what rank 0 finds in its cache, on every rank. None: nothing."""
    values = torch.full((length,), torch.nan, dtype=torch.float64)
    if context.world.is_main and path.is_file():
        values = torch.from_numpy(np.load(path, allow_pickle=False))
    if context.world.size > 1:
        dist.broadcast(values, 0)
    return None if bool(values.isnan().all()) else values


def _keep(path: Path, values: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with unfinished.open("wb") as file:
        np.save(file, values.numpy(), allow_pickle=False)
    unfinished.replace(path)
