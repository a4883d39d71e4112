"""The stacks of ranks that hang are in the attempt's logs, and those of healthy ones are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagecoach_api.names import ENV_PROGRESS_FILE
from stagecoach_api.outcomes import Cause
from stagecoach_trainer.launcher.log_uploads import LogUploads
from stagecoach_trainer.launcher.stack_dumps import (
    FLIGHT_RECORDER,
    LATE_SECONDS,
    SILENT_SECONDS,
    StackDumps,
    flight_recorder_environment,
    spied,
)
from tests.trainer.launcher.test_launcher import wait_for_progress
from tests.trainer.launcher.test_log_uploads import stage_of
from tests.trainer.makers import make_attempt

HANGS = """
import ctypes, os, pathlib, time
def wait_for_a_collective():
    libc = ctypes.PyDLL(None)  # keeps the GIL, as a hanging extension may
    libc.sleep(600)
def run(config, context):
    context.progress.report("train")
    time.sleep(0.3)
    os.utime(os.environ["STAGECOACH_PROGRESS_FILE"], (0, 0))
    pathlib.Path(os.environ["STAGECOACH_WORK_DIR"], "hanging").touch()
    wait_for_a_collective()
"""
RANK = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, all_threads=True)
def deep_in_training():
    print("ready", flush=True)
    time.sleep(60)
deep_in_training()
"""


@pytest.fixture
def rank() -> Iterator[subprocess.Popen[str]]:
    """A process that handles the request as a rank does."""
    with subprocess.Popen([sys.executable, "-c", RANK], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def stacks_of(rank: subprocess.Popen[str]) -> str:
    """End a rank; return what it has written to its log."""
    rank.terminate()
    return rank.communicate()[1]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def dumps_of(tmp_path: Path, silence: float | None, grace: float = 300.0) -> tuple[StackDumps, Clock, list[str]]:
    progress = tmp_path / "progress.jsonl"
    clock, notes = Clock(), list[str]()
    if silence is not None:
        progress.touch()
        os.utime(progress, (clock.now - silence, clock.now - silence))
    environment = {ENV_PROGRESS_FILE: str(progress)}
    return StackDumps(environment, grace, lambda rank, text: notes.append(text), clock), clock, notes


def test_a_stage_that_hangs_leaves_its_stacks_in_its_log(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, HANGS)
    launcher = attempt.start("--grace-seconds=2")
    wait_for_progress(attempt, "train", 0)
    while not (attempt.work / "hanging").exists():
        assert launcher.poll() is None, attempt.log
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(60)
    assert attempt.result.cause is Cause.PREEMPTION, "the driver knows why it asked"
    (stored,) = attempt.store.glob("artifacts/*/attempts/*/logs/rank-00000.*.log")
    log = stored.read_text()
    assert "no progress for" in log
    assert "in wait_for_a_collective" in log


def test_silent_ranks_are_dumped_before_they_are_asked_to_stop(tmp_path: Path, rank: subprocess.Popen[str]) -> None:
    dumps, _, notes = dumps_of(tmp_path, silence=SILENT_SECONDS)
    dumps.look({0: rank.pid})
    assert "no progress for 300 s" in notes[0]
    assert "in deep_in_training" in stacks_of(rank)


@pytest.mark.parametrize(("grace", "late"), [(300.0, LATE_SECONDS), (20.0, 10.0)])
@pytest.mark.parametrize("silence", [None, 1.0], ids=["a node without rank 0", "a rank that trains"])
def test_others_are_dumped_once_if_they_do_not_end(
    tmp_path: Path, rank: subprocess.Popen[str], silence: float | None, grace: float, late: float
) -> None:
    dumps, clock, notes = dumps_of(tmp_path, silence, grace)
    dumps.look({0: rank.pid})
    clock.now += late - 0.1
    dumps.look({0: rank.pid})
    assert notes == []
    for _ in range(3):
        clock.now += 0.1
        dumps.look({0: rank.pid})
    assert sum("follow" in note for note in notes) == 1
    assert stacks_of(rank).count("in deep_in_training") == 1


def test_a_rank_that_has_ended_is_no_error(tmp_path: Path, rank: subprocess.Popen[str]) -> None:
    rank.kill()
    rank.wait()
    dumps, _, notes = dumps_of(tmp_path, silence=SILENT_SECONDS)
    dumps.look({0: rank.pid})
    assert "no progress" in notes[0]


def test_py_spy_reads_a_rank_from_outside_or_reports_why_not(rank: subprocess.Popen[str]) -> None:
    text = spied(rank.pid, 10.0)
    assert "deep_in_training" in text or text.startswith("py-spy: ")
    assert spied(rank.pid, 0.0) == ""


def test_dumps_of_nccl_are_stored_with_the_logs(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "logs"
    folder.mkdir(parents=True)
    variables = flight_recorder_environment({"TORCH_FR_BUFFER_SIZE": "5"}, tmp_path / "work")
    assert "TORCH_FR_BUFFER_SIZE" not in variables, "the user's value stays"
    Path(variables["TORCH_FR_DUMP_TEMP_FILE"] + "3").write_bytes(b"dump")
    (folder / "another").write_bytes(b"")
    uploads = LogUploads(stage_of(tmp_path), [], lambda line: None, folder=folder)
    uploads.finish(10)
    stored = [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert stored == [f"{FLIGHT_RECORDER}3"]
