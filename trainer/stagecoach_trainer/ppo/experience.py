"""Experiences (scored answers with their per-token figures), and the pool that holds those of one update.

A tokens of an answer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from stagecoach_trainer.batches.rows import Ids

Floats = npt.NDArray[np.float32]

PER_TOKEN = ("log_probs", "values", "advantages", "returns")


@dataclass(frozen=True)
class Experience:
    """One scored answer (a `Unit` of an update)."""

    prompt: Ids
    answer: Ids
    """Token ids [A], the end token included."""

    log_probs: Floats
    """Log-probabilities under the policy that generated the answer, at the sampling temperature, by the training
    forward pass, in nats [A]."""

    values: Floats
    """The critic's prediction before each token [A]."""

    advantages: Floats
    """GAE advantages [A], not whitened."""

    returns: Floats
    """Targets of the critic [A]."""

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the model: all but the last one, which is only predicted."""
        return len(self.prompt) + len(self.answer) - 1

    @property
    def num_targets(self) -> int:
        return len(self.answer)

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


class Pool:
    """The experiences of one update on this rank. Those beyond `max_bytes` are stored on disk and memory-mapped."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._bytes = 0
        self._chunks: list[Sequence[Experience]] = []
        self._first: list[int] = []
        self._size = 0
        self.num_spilled = 0
        """Number of experiences on disk."""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Experience:
        # The last chunk that begins at or before `index`; `right` skips empty chunks, which begin where the next does.
        chunk = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._chunks[chunk][index - self._first[chunk]]

    def __iter__(self) -> Iterator[Experience]:
        return (self[index] for index in range(len(self)))

    def add(self, chunk: Sequence[Experience]) -> None:
        """Append experiences that were made together. Raises OSError if the disk is full, and leaves the pool
        unchanged."""
        size = sum(item.num_bytes for item in chunk)
        if self._bytes + size <= self._max_bytes:
            self._bytes += size
            self._append(chunk)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"chunk-{len(self._chunks):06d}.safetensors"
        write_chunk(path, chunk)
        # Counted only once the file is complete, so that an error leaves the pool unchanged.
        self.add_stored(StoredChunk(path))

    def add_stored(self, chunk: StoredChunk) -> None:
        """Append the experiences of a file."""
        self._append(chunk)
        self.num_spilled += len(chunk)

    def _append(self, chunk: Sequence[Experience]) -> None:
        self._first.append(self._size)
        self._chunks.append(chunk)
        self._size += len(chunk)

    def discard(self) -> None:
        """Delete the files on disk. The pool must not be used afterwards."""
        # First, because a deleted file occupies the disk for as long as it is mapped.
        self._chunks.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def write_chunk(path: Path, chunk: Sequence[Experience]) -> None:
    """Write experiences to one file: each field's arrays concatenated, and the offsets at which experiences begin.

    Raises OSError with the file's name, and leaves no partial file.
    """
    tensors = {
        field.name: np.concatenate([getattr(item, field.name) for item in chunk]) for field in fields(Experience)
    }
    tensors["prompt_offsets"] = np.cumsum([0, *(len(item.prompt) for item in chunk)])
    tensors["answer_offsets"] = np.cumsum([0, *(len(item.answer) for item in chunk)])
    try:
        # Not safetensors' `save_file`, which does not report a full disk.
        path.write_bytes(save(tensors))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


class StoredChunk(Sequence[Experience]):
    """Experiences in a file, read on access."""

    def __init__(self, path: Path) -> None:
        self._file = cast(Any, safe_open(path, framework="numpy"))
        self._prompts = self._file.get_tensor("prompt_offsets")
        self._answers = self._file.get_tensor("answer_offsets")

    def __len__(self) -> int:
        return len(self._prompts) - 1

    def __getitem__(self, index: int) -> Experience:  # type: ignore[override]  # no slices
        prompt = slice(int(self._prompts[index]), int(self._prompts[index + 1]))
        answer = slice(int(self._answers[index]), int(self._answers[index + 1]))
        # `get_slice` reads one answer's numbers; `get_tensor` would read those of the whole file.
        return Experience(
            prompt=self._file.get_slice("prompt")[prompt],
            answer=self._file.get_slice("answer")[answer],
            **{name: self._file.get_slice(name)[answer] for name in PER_TOKEN},
        )
