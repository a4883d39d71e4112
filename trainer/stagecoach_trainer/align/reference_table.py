"""Log-probabilities of answers under the reference, computed once and cached on disk.

Sequences are scored in windows. The result of a window is a file `cache/references/<digest>.scores`, named by a digest
of everything it depends on, so a resumed attempt uses exactly the same numbers: the SHA-256 of the numbers, then the
numbers (fp64, little-endian). A window whose SHA-256 is wrong is scored again.
"""

from __future__ import annotations

import hashlib
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
from stagecoach_trainer.runtime.sealed import read_sealed, write_sealed
from stagecoach_trainer.samples.groups import TokenSequence

VERSION = 2
"""Part of the digest; increment it when the code computes different numbers from the same input."""

WINDOW = 1024
"""Sequences per cache file."""

NUMBER = np.dtype("<f8")
"""Number format of cache files."""

Scorer = Callable[[Sequence[TokenSequence]], Tensor]
"""Returns the log-probability of each sequence's answer, in nats, fp64 [N], the same on every rank."""


def key_of(sequence: TokenSequence) -> bytes:
    """Return a digest of a sequence: of its tokens and the position at which the answer begins."""
    content = np.ascontiguousarray(sequence.ids, np.int32).tobytes()
    return hashlib.blake2b(content, digest_size=16, salt=sequence.num_prompt.to_bytes(8, "little")).digest()


def windows(sequences: Iterable[TokenSequence], size: int = WINDOW) -> Iterator[list[TokenSequence]]:
    """Yield the distinct sequences in lists of at most `size`."""
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
        """Return the log-probabilities, fp64 [N]. Raises KeyError for a sequence that is not in the table."""
        return torch.tensor([self._values[key_of(item)] for item in sequences], dtype=torch.float64)


def fill_table(
    table: ReferenceTable,
    context: StageContext,
    key: Mapping[str, Any],
    sequences: Iterable[TokenSequence],
    scorer: Callable[[], Scorer],
) -> None:
    """Add all sequences to the table, from the cache or by scoring them.

    Args:
        table: Receives the log-probabilities.
        context: Provides the cache, the stop signal and the progress report.
        key: Everything besides the sequences that determines the numbers: the reference and how it is computed.
        sequences: The sequences to add; duplicates are scored once.
        scorer: Returns the scorer. Called only if the cache lacks a window, and at most once per window.

    Raises:
        Interrupted: On all ranks, if any rank is asked to stop. Finished windows stay in the cache.
        UserError: The reference returns NaN or infinite log-probabilities.
    """
    done = 0
    for window in windows(sequences):
        # Between windows: every finished one is in the cache, so a resumed attempt loses less than one.
        _stop_together(context)
        content = hashlib.sha256(b"".join(map(key_of, window))).hexdigest()
        path = context.cache / "references" / f"{digest_of({'version': VERSION, **key, 'sequences': content})}.scores"
        log_probs = _cached(context, path, len(window))
        if log_probs is None:
            log_probs = scorer()(window)
            _require_finite(log_probs)
            if context.world.local_rank == 0:
                write_sealed(path, log_probs.numpy().astype(NUMBER).tobytes())
        table.put(window, log_probs)
        done += len(window)
        context.progress.report("score with the reference", done, unit="answers")


def _require_finite(log_probs: Tensor) -> None:
    bad = ~log_probs.isfinite()
    if bool(bad.any()):
        raise UserError(
            f"reference: the log-probabilities of {int(bad.sum())} of {len(log_probs)} answers are NaN or infinite; "
            "the model is damaged, or its weights overflow in this `precision` (try `bf16` or `fp32`)"
        )


def _stop_together(context: StageContext) -> None:
    stop = torch.tensor([float(context.stop.is_set())])
    if context.world.size > 1:
        dist.all_reduce(stop)
    if stop.item():
        raise Interrupted("stopped while the reference scored the answers; finished windows are cached")


def _cached(context: StageContext, path: Path, length: int) -> Tensor | None:
    """Return the content of rank 0's cache file on every rank; None if there is no file."""
    # Scores are finite, so NaN in the broadcast means that there is no file.
    values = torch.full((length,), torch.nan, dtype=torch.float64)
    content = read_sealed(path) if context.world.is_main else None
    if content is not None:
        values = torch.from_numpy(np.frombuffer(content, NUMBER).astype(np.float64))
    if context.world.size > 1:
        dist.broadcast(values, 0)
    return None if bool(values.isnan().all()) else values
