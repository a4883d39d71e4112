"""Pipes that carry the output of a node's ranks to the launcher, one for each: a killed worker loses nothing it has
printed, and no worker waits for the reader of the launcher's own output. Imports nothing heavy.

The first rank inherits its pipe. torchrun's workers all inherit torchrun's output, so the others open theirs by name:
`<work>/outcomes/rank-00001.pipe`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stagecoach_trainer.runtime.attempt_files import logs_folder, outcomes_folder


class RankPipe(NamedTuple):
    """Both ends of one rank's pipe as file descriptors of the launcher. The launcher keeps the writing end open so that
    the pipe does not end before the worker has opened it."""

    rank: int
    """Global rank."""
    reader: int
    writer: int


def open_pipes(work: Path, ranks: Sequence[int]) -> list[RankPipe]:
    """Return a pipe for every rank of this node. If the file system has no named pipes, return one for the first rank,
    which the others share."""
    pipes = [RankPipe(ranks[0], *os.pipe())]
    with contextlib.suppress(OSError):
        for rank in ranks[1:]:
            pipes.append(_named_pipe(rank, _path(work, rank)))
    return pipes


def close_pipes(work: Path, pipes: Sequence[RankPipe]) -> None:
    """Close the writing ends, so that reading ends with the last worker, and remove the names."""
    for pipe in pipes:
        os.close(pipe.writer)
        _path(work, pipe.rank).unlink(missing_ok=True)


def print_into_pipe(work: Path, rank: int) -> None:
    """Redirect this worker's output to its named pipe. The first worker of a node, and one without a launcher, have no
    named pipe and keep their output."""
    try:
        handle = os.open(_path(work, rank), os.O_WRONLY | os.O_NONBLOCK)  # fails if there is no reader
    except OSError:
        return
    os.set_blocking(handle, True)
    _print_into(handle)


def print_into_log(work: Path, rank: int) -> None:
    """Redirect this worker's output to the end of its log, after the launcher that read it has died."""
    logs = sorted(logs_folder(work).glob(f"rank-{rank:05d}.*.log"))
    try:
        handle = os.open(logs[-1] if logs else os.devnull, os.O_WRONLY | os.O_APPEND)
    except OSError:
        return
    _print_into(handle)


def _path(work: Path, rank: int) -> Path:
    return outcomes_folder(work) / f"rank-{rank:05d}.pipe"


def _named_pipe(rank: int, path: Path) -> RankPipe:
    os.mkfifo(path, 0o600)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else `open` would wait for a writer
    os.set_blocking(reader, True)
    return RankPipe(rank, reader, os.open(path, os.O_WRONLY))


def _print_into(handle: int) -> None:
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
