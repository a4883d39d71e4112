"""What the ranks of a node print: into a file each, on to the launcher's own output, and to the run's store.

    worker ── pipe ──► copying thread ─┬─► LogFile   work/logs/rank-00003.20261122T095244.125Z.log ──► LogUploads
                                       └─► Output    the launcher's stdout; of several ranks with `[rank 3] `

A worker waits for nothing but the copying thread, and that thread for nothing but the disk: a full disk leaves a gap in
the file, a slow or closed output a gap there. Imported when the workers are on their way.
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
"""What is left of a log that had to be cut, so that this is seldom done."""
READ_BYTES = 1 << 16
MOVED_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 16
"""A longer line of one of several ranks is passed on in pieces."""
MAX_WAITING_BYTES = 4 << 20
"""What the launcher holds for a slow reader of its output."""
LAST_BYTES = 1 << 16
"""In which torchrun's account of dead workers is looked for: it is the last that it says."""
DRAIN_SECONDS = 2.0
"""How long the pipes of ended workers are read on: a process they left behind may hold them open."""
OUTPUT_SECONDS = 2.0
"""How long the launcher waits at its end for the reader of its output."""
BUSY_SECONDS = 0.05


class RankLogs:
    """All of a node's logs, from the start of its workers to their end."""

    def __init__(
        self, pipes: Sequence[RankPipe], work: Path, stage: bytes, started: float, output: Output | None = None
    ) -> None:
        """`stage`: what the stage file holds. `started`: seconds since the epoch, the start of this launcher.
        `output`: None is this process's standard output."""
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
        self._copier = threading.Thread(target=self._copy, name="logs", daemon=True)
        self._copier.start()
        self._uploads = LogUploads(stage, [sink.log for sink in self._sinks], self.say)

    def say(self, message: str) -> None:
        """Print a line of the launcher's own."""
        self._output.put(f"[launcher] {message}\n".encode())

    def drain(self) -> bytes:
        """Read what the ended workers have printed; return the last of the first rank's log."""
        if not self._drained:
            self._drained = True
            close_pipes(self._work, self._pipes)
            self._copier.join(DRAIN_SECONDS)
        return self._sinks[0].log.content()[1][-LAST_BYTES:]

    def finish(self, seconds: float) -> None:
        """Read what the ended workers have printed, and store it; give up after about `seconds`."""
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
    """Where the bytes of one rank go."""

    log: LogFile
    output: Output
    lines: Lines | None
    """None: it is alone on its node, and what it prints is passed on as it is."""

    def take(self, data: bytes) -> None:
        """Take what the rank has printed; nothing means that there will be no more."""
        if data:
            self.log.append(data)
        if self.lines is not None:
            data = self.lines.feed(data) if data else self.lines.rest()
        if data:
            self.output.put(data)


# -- files -------------------------------------------------------------------------------------------------------------


class LogFile:
    """A file with the last `max_bytes` of what one rank has printed. Its first line says if there was more."""

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
        """Bytes that were ever given to it."""
        return self._taken

    def append(self, data: bytes) -> None:
        """Add to the file. What the disk does not take is missing, and the file says so once it takes more."""
        rest = memoryview(data)
        with self._lock:
            self._taken += len(data)
            try:
                file = self._opened()
                if self._size + len(data) > self._max_bytes:
                    self._cut_front(file)
                if self._missing:
                    self._write(file, memoryview(self._gap()))
                    self._missing = 0
                while rest:
                    rest = rest[self._write(file, rest) :]
            except OSError as error:
                self._missing += len(rest)
                self._why = error.strerror or str(error)

    def content(self) -> tuple[int, bytes]:
        """Return how much had been taken, and what is kept of it."""
        with self._lock:
            kept = os.pread(self._file.fileno(), self._size, 0) if self._file is not None else b""
            return self._taken, kept + (self._gap() if self._missing else b"")

    def _opened(self) -> FileIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w+b", buffering=0)
        return self._file

    def _write(self, file: FileIO, data: memoryview) -> int:
        written = file.write(data)
        self._size += written
        return written

    def _gap(self) -> bytes:
        return f"\n[{self._missing} bytes are missing here: {self._why}]\n".encode()

    def _cut_front(self, file: FileIO) -> None:
        """Move the end of the file to its beginning, which needs no more of the disk."""
        handle = file.fileno()
        source = max(self._size - int(self._max_bytes * KEPT_PART), len(self._first_line))
        source += os.pread(handle, MAX_LINE_BYTES, source).find(b"\n") + 1
        self._cut += source - len(self._first_line)
        most = f"{self._max_bytes >> 20} MiB" if self._max_bytes >= 1 << 20 else f"{self._max_bytes} bytes"
        self._first_line = f"[{self._cut} bytes are cut off here: a log keeps its last {most} at most]\n".encode()
        os.pwrite(handle, self._first_line, 0)
        target = len(self._first_line)
        while chunk := os.pread(handle, MOVED_BYTES, source):
            target += os.pwrite(handle, chunk, target)
            source += len(chunk)
        file.truncate(target)
        file.seek(target)
        self._size = target


# -- the launcher's own output -----------------------------------------------------------------------------------------


class Lines:
    """Puts a prefix before each line of a stream that comes in pieces. `\\r`, with which progress bars go back to the
    beginning of their line, ends a line too."""

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
        return b"".join(piece if piece in (b"\r", b"\n") else self._prefix + piece for piece in pieces)

    def rest(self) -> bytes:
        """Return the line that was begun and never ended."""
        return self.feed(b"\n") if self._begun else b""


class Output:
    """Passes bytes on to a file descriptor from a thread of its own. What a slow reader does not take in time is
    dropped, and counted; what nobody reads at all is dropped."""

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
        """Hand over bytes; never waits for the reader."""
        with self._changed:
            if self._num_bytes + len(data) > self._max_bytes:
                self._dropped += len(data)
                return
            self._own_up()
            self._queue(data)
            self._changed.notify()

    def finish(self, seconds: float) -> None:
        """Wait until everything is passed on, but no longer than this."""
        with self._changed:
            self._own_up()
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _own_up(self) -> None:
        if self._dropped:
            self._queue(f"\n[{self._dropped} bytes are not shown here, nobody took them: the log has them]\n".encode())
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
            self._write(data)
            with self._changed:
                self._num_bytes -= len(data)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # shared with a process that made it so
                time.sleep(BUSY_SECONDS)
            except OSError:  # nobody reads it any more, or its disk is full
                return
