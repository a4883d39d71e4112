"""The output of a node's ranks: to one file each, to the launcher's own output, and to the run's store.

    worker ── pipe ──► copying thread ─┬─► LogFile   work/logs/rank-00003.20261122T095244.125Z.log ──► LogUploads
                                       └─► Output    the launcher's stdout; of several ranks with `[rank 3] `

A worker waits for the copying thread alone, and that thread for the disk alone: a full disk leaves a gap in the file, a
slow or closed output a gap there. Imported after the workers have started.
"""

from __future__ import annotations

import os
import re
import selectors
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from stagecoach_api.artifacts import rank_log_name, rank_mark
from stagecoach_trainer.launcher.log_uploads import LogUploads
from stagecoach_trainer.launcher.rank_pipes import RankPipe, close_pipes
from stagecoach_trainer.runtime.attempt_files import logs_folder

MAX_LOG_BYTES = 64 << 20
"""A longer log loses its beginning."""
KEPT_PART = 0.75
"""Share of MAX_LOG_BYTES that is left of a log after a cut, so that cuts are rare."""
READ_BYTES = 1 << 16
MOVED_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 16
"""A longer line of one of several ranks is printed in pieces."""
MAX_WAITING_BYTES = 4 << 20
"""Bytes that the launcher buffers for a slow reader of its output."""
LAST_BYTES = 1 << 16
"""End of a log that is searched for torchrun's report of dead workers, its final output."""
DRAIN_SECONDS = 2.0
"""How long the pipes of ended workers are still read: a child process may hold them open."""
OUTPUT_SECONDS = 2.0
"""How long the launcher waits for the reader of its output before it exits."""
BUSY_SECONDS = 0.05


class RankLogs:
    """All of a node's logs, from the start of its workers to their end."""

    def __init__(
        self, pipes: Sequence[RankPipe], work: Path, stage: bytes, started: float, output: Output | None = None
    ) -> None:
        """`stage`: the content of the stage file. `started`: when this launcher started, in seconds since the epoch.
        `output`: by default this process's standard output."""
        folder = logs_folder(work)
        self._work = work
        self._pipes = pipes
        self._output = output or Output()
        self._drained = False
        self._sinks = [
            RankSink(
                LogFile(folder / rank_log_name(pipe.rank, started)),
                self._output,
                Lines(rank_mark(pipe.rank).encode()) if len(pipes) > 1 else None,
            )
            for pipe in pipes
        ]
        # A daemon, because a child process that holds a pipe open must not keep the launcher from exiting.
        self._copier = threading.Thread(target=self._copy, name="logs", daemon=True)
        self._copier.start()
        self._uploads = LogUploads(stage, [sink.log for sink in self._sinks], self.say, folder=folder)

    def say(self, message: str) -> None:
        """Print a line of the launcher itself."""
        self._output.put(f"[launcher] {message}\n".encode())

    def note(self, index: int, text: str) -> None:
        """Add a text of the launcher to the log of one of this node's ranks, and to the output."""
        data = b"".join(f"[launcher] {line}\n".encode() for line in text.splitlines())
        self._sinks[min(index, len(self._sinks) - 1)].log.append(data)
        self._output.put(data)

    def end_of(self, index: int) -> bytes:
        """Read the remaining output of the ended workers; return the end of the log of one of this node's ranks."""
        self.drain()
        return self._sinks[min(index, len(self._sinks) - 1)].log.content()[1][-LAST_BYTES:]

    def drain(self) -> bytes:
        """Read the remaining output of the ended workers; return the end of the first rank's log."""
        if not self._drained:
            self._drained = True
            close_pipes(self._work, self._pipes)
            self._copier.join(DRAIN_SECONDS)
        return self._sinks[0].log.content()[1][-LAST_BYTES:]

    def finish(self, seconds: float) -> None:
        """Read the remaining output of the ended workers and store it; give up after about `seconds`."""
        deadline = time.monotonic() + seconds
        self.drain()
        self._uploads.finish(deadline - time.monotonic())
        self._output.finish(OUTPUT_SECONDS)

    def _copy(self) -> None:
        with selectors.DefaultSelector() as selector:
            for pipe, sink in zip(self._pipes, self._sinks, strict=True):
                selector.register(pipe.reader, selectors.EVENT_READ, sink)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, READ_BYTES)
                    key.data.take(data)
                    if not data:
                        selector.unregister(key.fd)


@dataclass(frozen=True)
class RankSink:
    """The destinations of one rank's output."""

    log: LogFile
    output: Output
    lines: Lines | None
    """None if the rank is alone on its node: its output is printed unchanged."""

    def take(self, data: bytes) -> None:
        """Process output of the rank; empty data means that there is no more."""
        if data:
            self.log.append(data)
        if self.lines is not None:
            data = self.lines.feed(data) if data else self.lines.rest()
        if data:
            self.output.put(data)


# -- files -------------------------------------------------------------------------------------------------------------


class LogFile:
    """A file with the last `max_bytes` of one rank's output. If there was more, its first line states how much."""

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._size = 0
        self._taken = 0
        self._first_line = b""
        self._cut = 0
        self._missing = 0
        self._why = ""

    @property
    def taken(self) -> int:
        """Bytes ever passed to `append`."""
        return self._taken

    def append(self, data: bytes) -> None:
        """Append to the file. Bytes that the disk does not accept are lost, which the next successful write states."""
        rest = memoryview(data)
        with self._lock:
            self._taken += len(data)
            try:
                file = self._opened()
                if self._size + len(data) > self._max_bytes:
                    self._cut_front(file)
                # The count is reset only after the note is written: on a disk that is still full, it keeps growing.
                if self._missing:
                    self._write(file, memoryview(self._gap()))
                    self._missing = 0
                while rest:
                    rest = rest[self._write(file, rest) :]
            except OSError as error:
                self._missing += len(rest)
                self._why = error.strerror or str(error)

    def content(self) -> tuple[int, bytes]:
        """Return `taken` and the bytes that are kept."""
        with self._lock:
            kept = os.pread(self._file.fileno(), self._size, 0) if self._file is not None else b""
            return self._taken, kept + (self._gap() if self._missing else b"")

    def _opened(self) -> FileIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: `pread` and `pwrite` bypass a buffer, and `write` returns how much the disk has accepted.
            self._file = self.path.open("w+b", buffering=0)
        return self._file

    def _write(self, file: FileIO, data: memoryview) -> int:
        written = file.write(data)
        self._size += written
        return written

    def _gap(self) -> bytes:
        return f"\n[{self._missing} bytes are missing here: {self._why}]\n".encode()

    def _cut_front(self, file: FileIO) -> None:
        """Move the end of the file to its beginning, which needs no more disk space."""
        handle = file.fileno()
        source = max(self._size - int(self._max_bytes * KEPT_PART), len(self._first_line))
        source += os.pread(handle, MAX_LINE_BYTES, source).find(b"\n") + 1  # to the start of a line, if it is near
        # Only the ranks' output counts, not the earlier first line, with which the file begins.
        self._cut += source - len(self._first_line)
        most = f"{self._max_bytes >> 20} MiB" if self._max_bytes >= 1 << 20 else f"{self._max_bytes} bytes"
        self._first_line = f"[{self._cut} bytes are cut off here: a log keeps its last {most} at most]\n".encode()
        os.pwrite(handle, self._first_line, 0)
        target = len(self._first_line)
        # Source and target may overlap; chunks are copied forward, so nothing is overwritten before it is read.
        while chunk := os.pread(handle, MOVED_BYTES, source):
            target += os.pwrite(handle, chunk, target)
            source += len(chunk)
        file.truncate(target)
        file.seek(target)
        self._size = target


# -- the launcher's own output -----------------------------------------------------------------------------------------


class Lines:
    """Adds a prefix to each line of a stream that arrives in pieces. `\\r`, with which progress bars return to the
    start of their line, ends a line too."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._begun = b""

    def feed(self, data: bytes) -> bytes:
        """Return the lines that `data` completes."""
        pieces = re.split(rb"(?<=[\r\n])", self._begun + data)
        self._begun = pieces.pop()
        if len(self._begun) > MAX_LINE_BYTES:
            pieces.append(self._begun + b"\n")
            self._begun = b""
        # A line end alone gets no prefix: it is an empty line, or the `\n` of a `\r\n`.
        return b"".join(piece if piece in (b"\r", b"\n") else self._prefix + piece for piece in pieces)

    def rest(self) -> bytes:
        """Return the last line, which has no end."""
        return self.feed(b"\n") if self._begun else b""


class Output:
    """Writes bytes to a file descriptor in a background thread. What a slow reader does not accept in time is dropped
    and counted; output without a reader is dropped."""

    def __init__(self, descriptor: int = 1, max_bytes: int = MAX_WAITING_BYTES) -> None:
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._waiting: deque[bytes] = deque()
        self._num_bytes = 0
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="output", daemon=True)
        self._thread.start()

    def put(self, data: bytes) -> None:
        """Queue bytes without waiting for the reader."""
        with self._changed:
            if self._num_bytes + len(data) > self._max_bytes:
                self._dropped += len(data)
                return
            self._report_dropped()
            self._queue(data)
            self._changed.notify()

    def finish(self, seconds: float) -> None:
        """Wait until everything is written, for at most `seconds`."""
        with self._changed:
            self._report_dropped()
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _report_dropped(self) -> None:
        if self._dropped:
            self._queue(f"\n[{self._dropped} bytes not shown, as the reader was too slow; the log has them]\n".encode())
            self._dropped = 0

    def _queue(self, data: bytes) -> None:
        self._waiting.append(data)
        self._num_bytes += len(data)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            # Without the lock, so that `put` never waits for the reader. Bytes count as waiting until written.
            self._write(data)
            with self._changed:
                self._num_bytes -= len(data)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process that shares the descriptor has made it non-blocking
                time.sleep(BUSY_SECONDS)
            except OSError:  # it has no reader any more, or its disk is full
                return
