"""The output of ranks is kept completely, within limits, however slow its reader is."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.artifacts import attempt_logs_prefix, parse_rank_log_name
from stagecoach_trainer.launcher.rank_logs import MAX_LINE_BYTES, Lines, LogFile, Output, RankLogs
from stagecoach_trainer.launcher.rank_pipes import open_pipes, print_into_pipe
from stagecoach_trainer.runtime.attempt_files import clear_outcomes
from tests.trainer.makers import DIGEST, make_attempt


def numbered(count: int, start: int = 0) -> bytes:
    return b"".join(b"line %06d\n" % number for number in range(start, start + count))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_log_contains_the_output(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "logs" / "rank.log")
    assert log.content() == (0, b"")
    log.append(b"one\n")
    log.append(b"\rtwo \xff")
    assert log.content() == (10, b"one\n\rtwo \xff")
    assert log.path.read_bytes() == b"one\n\rtwo \xff"


def test_a_long_log_keeps_its_end_and_its_first_line_states_the_cut(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "rank.log", max_bytes=8192)
    for number in range(5000):
        log.append(numbered(1, number))
        assert log.path.stat().st_size <= 8192
    taken, content = log.content()
    first, _, rest = content.partition(b"\n")
    cut = int(first.split()[0].removeprefix(b"["))
    assert taken == 5000 * 12
    assert first.endswith(b"a log keeps its last 8192 bytes at most]")
    assert rest == numbered(5000)[cut:]
    assert len(content) > 8192 // 2


def test_a_log_of_one_endless_line_is_cut_too(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "rank.log", max_bytes=8192)
    for _ in range(100):
        log.append(b"x" * 500)
    content = log.content()[1]
    assert len(content) <= 8192
    assert content.endswith(b"x" * 500)


def test_output_that_a_full_disk_rejects_is_a_gap_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(tmp_path / "rank.log")
    log.append(b"before\n")
    with monkeypatch.context() as full:

        def refuse(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(log, "_write", refuse)
        log.append(b"lost\n")
        log.append(b"lost again\n")
        assert log.content() == (23, b"before\n\n[16 bytes are missing here: No space left on device]\n")
    log.append(b"after\n")
    assert log.content()[1] == b"before\n\n[16 bytes are missing here: No space left on device]\nafter\n"


def test_a_log_that_cannot_be_opened_yet_is_opened_later(tmp_path: Path) -> None:
    (tmp_path / "logs").write_bytes(b"a file in the folder's place")
    log = LogFile(tmp_path / "logs" / "rank.log")
    log.append(b"lost\n")
    (tmp_path / "logs").unlink()
    log.append(b"after\n")
    assert log.path.read_bytes() == b"\n[5 bytes are missing here: File exists]\nafter\n"


# -- lines -------------------------------------------------------------------------------------------------------------


def test_every_line_has_its_ranks_prefix_even_those_of_a_progress_bar() -> None:
    lines = Lines(b"[rank 3] ")
    assert lines.feed(b"one\ntw") == b"[rank 3] one\n"
    assert lines.feed(b"o\n\n 10%\r 20%\r") == b"[rank 3] two\n\n[rank 3]  10%\r[rank 3]  20%\r"
    assert lines.feed(b"dos\r\nend") == b"[rank 3] dos\r\n"
    assert lines.rest() == b"[rank 3] end\n"
    assert lines.rest() == b""


def test_a_line_without_end_is_printed_in_pieces() -> None:
    lines = Lines(b"> ")
    passed = b"".join(lines.feed(b"x" * 1000) for _ in range(200))
    assert len(passed) > 200 * 1000 - MAX_LINE_BYTES - 1000
    assert (passed + lines.rest()).count(b"x") == 200 * 1000


@given(st.binary(max_size=300), st.lists(st.integers(0, 300)))
def test_only_prefixes_are_added_however_the_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    lines, prefix = Lines(b"\0\1\2"), b"\0\1\2"
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    passed = b"".join(lines.feed(data[start:end]) for start, end in itertools.pairwise(edges))
    passed += lines.rest()
    whole = Lines(prefix)
    assert passed == whole.feed(data) + whole.rest()
    assert passed.replace(prefix, b"") in (data.replace(prefix, b""), data.replace(prefix, b"") + b"\n")


# -- the launcher's own output -----------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """Reading and writing end of a pipe; a test that closes one removes it from the list."""
    ends = list(os.pipe())
    yield ends
    for end in ends:
        os.close(end)


def test_bytes_are_written_in_order(pipe: list[int]) -> None:
    output = Output(pipe[1])
    output.put(b"one ")
    output.put(b"two")
    output.finish(5)
    assert os.read(pipe[0], 100) == b"one two"


def test_a_slow_reader_delays_no_worker_and_sees_how_much_it_missed(pipe: list[int]) -> None:
    output = Output(pipe[1], max_bytes=200_000)
    began = time.monotonic()
    for number in range(1000):
        output.put(b"%05d " % number * 200)  # 1.2 MB, of which the pipe holds 64 KiB
    assert time.monotonic() - began < 5
    read = bytearray()
    reader = threading.Thread(target=lambda: read.extend(b"".join(iter(lambda: os.read(pipe[0], 65536), b""))))
    reader.start()
    output.finish(10)
    os.close(pipe.pop())
    reader.join(10)
    said = read.rpartition(b"\n[")[2]
    missed = int(said.split()[0])
    assert said.endswith(b"bytes not shown, as the reader was too slow; the log has them]\n")
    assert missed + len(read) - len(said) - 2 == 1000 * 1200
    assert read.startswith(b"00000 ")


def test_the_end_does_not_wait_for_a_reader_that_never_reads(pipe: list[int]) -> None:
    output = Output(pipe[1])
    output.put(b"x" * 1_000_000)
    began = time.monotonic()
    output.finish(0.2)
    assert time.monotonic() - began < 2


def test_a_closed_output_is_ignored() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    output = Output(writer)
    for _ in range(10):
        output.put(b"x")
    output.finish(5)
    os.close(writer)


# -- a node's logs -----------------------------------------------------------------------------------------------------


def test_each_rank_of_a_node_has_a_log_in_the_store_and_its_prefix_in_the_output(
    tmp_path: Path, pipe: list[int]
) -> None:
    attempt = make_attempt(tmp_path, "")
    clear_outcomes(attempt.work)
    pipes = open_pipes(attempt.work, range(4, 7))
    logs = RankLogs(pipes, attempt.work, (attempt.work / "stage.json").read_bytes(), 1795341164.125, Output(pipe[1]))
    logs.say("printed by the launcher")
    for one in pipes[:2]:
        os.write(one.writer, b"of %d\n" % one.rank)
    logs.finish(10)
    folder = attempt.store / attempt_logs_prefix(DIGEST, "0001")
    stored = {parse_rank_log_name(path.name): path.read_bytes() for path in folder.iterdir()}
    assert {name.rank: data for name, data in stored.items() if name} == {4: b"of 4\n", 5: b"of 5\n", 6: b""}
    shown = os.read(pipe[0], 1000).splitlines()
    assert sorted(shown) == [b"[launcher] printed by the launcher", b"[rank 4] of 4", b"[rank 5] of 5"]


def test_a_process_that_keeps_the_pipe_open_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagecoach_trainer.launcher.rank_logs.DRAIN_SECONDS", 0.2)
    attempt = make_attempt(tmp_path, "")
    pipes = open_pipes(attempt.work, [0])
    left_behind = os.dup(pipes[0].writer)
    logs = RankLogs(pipes, attempt.work, (attempt.work / "stage.json").read_bytes(), 0.0)
    os.write(left_behind, b"last output\n")
    began = time.monotonic()
    logs.finish(10)
    os.close(left_behind)
    assert time.monotonic() - began < 5
    (stored,) = (attempt.store / attempt_logs_prefix(DIGEST, "0001")).iterdir()
    assert stored.read_bytes() == b"last output\n"


def test_without_named_pipes_all_ranks_share_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    clear_outcomes(tmp_path)
    monkeypatch.setattr(os, "mkfifo", refuse)
    (pipe,) = open_pipes(tmp_path, range(8))
    assert pipe.rank == 0
    print_into_pipe(tmp_path, 1)  # finds none, and leaves this process's output where it is
    os.close(pipe.reader)
    os.close(pipe.writer)
