"""The output of workers outlives them and their pod: real processes, however they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

import psutil
import pytest

from stagecoach_api.artifacts import attempt_logs_prefix, parse_rank_log_name
from stagecoach_api.outcomes import Cause, ExitCode
from stagecoach_api.store import open_store
from tests.s3 import ACCESS_KEY, SECRET_KEY, S3Server, make_bucket
from tests.trainer.makers import DIGEST, Attempt, make_attempt

PRINTS = """
import os, sys
from stagecoach_trainer.runtime.context import StageOutcome
def run(config, context):
    print("one")
    print("two", file=sys.stderr)
    os.system("echo three")
    os.write(1, "四\\r 10%\\r 20%".encode())
    (context.output / "report.json").write_text("{}")
    return StageOutcome()
"""
DIES = """
import ctypes, os, signal
def run(config, context):
    os.write(2, b"the last output of rank %d" % context.world.rank)
    if context.world.rank == context.world.size - 1:
        {death}
    signal.pause()
"""
FLOOD = """
from stagecoach_trainer.runtime.context import StageOutcome
def run(config, context):
    for number in range(200_000):
        print(f"line {number:06d} " + 50 * "x")
    (context.output / "report.json").write_text("{}")
    return StageOutcome()
"""
RAISES = """
from stagecoach_trainer.runtime.errors import UserError
def run(config, context):
    raise UserError("data.sources[0].uri: corpus.jsonl is empty; give records")
"""
LOSES_ITS_STORE = """
import shutil
from pathlib import Path
from stagecoach_trainer.runtime.errors import UserError
def run(config, context):
    store = Path(context.store.uri.removeprefix("file://"))
    shutil.rmtree(store)
    store.write_text("no folder")
    raise UserError("data.sources[0].uri: corpus.jsonl is empty; give records")
"""
WAITS = """
import time
def run(config, context):
    print(f"rank {context.world.rank} waits")
    time.sleep(600)
"""
FILLS_THE_DISK = """
import pathlib, time
from stagecoach_trainer.runtime.context import StageOutcome
def wait_for(path):
    while not path.exists():
        time.sleep(0.01)
def run(config, context):
    (context.work / "begun").touch()
    wait_for(context.work / "full")
    for number in range(2000):
        print(f"while full {number:06d}")
    (context.work / "printed").touch()
    wait_for(context.work / "room")
    print("after")
    (context.output / "report.json").write_text("{}")
    return StageOutcome()
"""
LEAVES_ONE_BEHIND = """
import subprocess
from stagecoach_trainer.runtime.errors import UserError
def run(config, context):
    child = subprocess.Popen(["sleep", "120"], start_new_session=True)
    (context.work / "left").write_text(str(child.pid))
    raise UserError("bad data")
"""


def change(attempt: Attempt, **fields: object) -> None:
    """Change fields of the stage file."""
    path = attempt.work / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def wait_for(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_all_output_of_a_worker_is_in_its_log_and_in_the_launchers_output(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, PRINTS)
    began = time.time()
    assert attempt.run() == 0, attempt.log
    printed = "one\ntwo\nthree\n四\r 10%\r 20%"
    assert printed in (tmp_path / "log.txt").read_bytes().decode()
    (local,) = (attempt.work / "logs").glob("rank-*")
    (kept,) = (attempt.store / attempt_logs_prefix(DIGEST, "0001")).glob("rank-*")
    assert local.name == kept.name
    assert local.read_bytes() == kept.read_bytes()
    assert printed in kept.read_bytes().decode()
    name = parse_rank_log_name(kept.name)
    assert name is not None
    assert began - 1 < name.started < time.time()


@pytest.mark.parametrize(
    ("death", "exit_code", "output"),
    [
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", 137, "the last output of rank 0", id="kill -9"),
        pytest.param("ctypes.string_at(0)", 139, "Fatal Python error: Segmentation fault", id="native code"),
    ],
)
def test_the_last_output_of_a_dying_worker_is_kept(tmp_path: Path, death: str, exit_code: int, output: str) -> None:
    attempt = make_attempt(tmp_path, DIES.replace("{death}", death))
    assert attempt.run() == exit_code
    assert output in attempt.stored_logs()[0]


def test_a_worker_whose_launcher_is_killed_ends_its_log_itself(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, WAITS)
    launcher = attempt.start()
    wait_for(attempt.progress.parent / "outcomes" / "rank-00000.pid")
    deadline = time.monotonic() + 60
    while "waits" not in attempt.log:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher.kill()
    launcher.wait()
    wait_for(attempt.work / "outcomes" / "rank-00000.json")
    (log,) = (attempt.work / "logs").glob("rank-*")
    assert "rank 0 waits\n" in log.read_text()
    assert "stopped by SIGTERM" in log.read_text()


@pytest.mark.parametrize("reader", ["never reads", "goes away"])
def test_a_worker_does_not_wait_for_the_reader_of_its_launchers_output(tmp_path: Path, reader: str) -> None:
    attempt = make_attempt(tmp_path, FLOOD)
    with launched_to_a_reader(attempt) as launcher:
        assert launcher.stdout is not None
        if reader == "goes away":
            launcher.stdout.close()
        assert launcher.wait(120) == 0
    lines = [line for line in attempt.stored_logs()[0].splitlines() if line.startswith("line ")]
    assert [line[5:11] for line in lines] == [f"{number:06d}" for number in range(200_000)]


def launched_to_a_reader(attempt: Attempt) -> subprocess.Popen[bytes]:
    """Start the launcher with its output in a pipe of the test."""
    return subprocess.Popen(
        [sys.executable, "-m", "stagecoach_trainer.launcher"],
        env=attempt.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def read_to(stream: IO[bytes], last: bytes) -> bytes:
    """Read lines up to the one with this end."""
    lines = [next(stream)]
    while not lines[-1].endswith(last):
        lines.append(next(stream))
    return b"".join(lines)


def test_a_full_disk_leaves_a_gap_in_the_log_and_the_stage_continues(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, FILLS_THE_DISK)
    with launched_to_a_reader(attempt) as launcher:
        wait_for(attempt.work / "begun")
        process, unlimited = psutil.Process(launcher.pid), psutil.RLIM_INFINITY
        process.rlimit(psutil.RLIMIT_FSIZE, (8192, unlimited))  # a file that may not grow: the same to who writes
        (attempt.work / "full").touch()
        wait_for(attempt.work / "printed")
        assert launcher.stdout is not None
        shown = read_to(launcher.stdout, b"while full 001999\n")  # what is shown has been offered to the log before
        process.rlimit(psutil.RLIMIT_FSIZE, (unlimited, unlimited))
        (attempt.work / "room").touch()
        output = (shown + launcher.stdout.read()).decode()  # its stdin stays open: the end of that would stop it
        assert launcher.wait(60) == 0, output
    log = attempt.stored_logs()[0]
    assert "while full 001999\n" not in log
    assert "bytes are missing here: File too large]\nafter\n" in log
    assert "while full 001999\n" in output


def test_logs_that_cannot_be_stored_do_not_hide_how_the_stage_ended(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, LOSES_ITS_STORE)
    change(attempt, storageUri=str(tmp_path / "lost"))
    assert attempt.run() == ExitCode.USER_ERROR
    assert attempt.result.message == "data.sources[0].uri: corpus.jsonl is empty; give records"
    assert attempt.log.count("[launcher] the logs of this node could not be stored: ") == 1


def test_an_orphaned_process_of_a_worker_does_not_delay_the_end(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, LEAVES_ONE_BEHIND)
    launcher = attempt.start()
    wait_for(attempt.work / "left")
    began = time.monotonic()
    assert launcher.wait(60) == ExitCode.USER_ERROR
    assert time.monotonic() - began < 15
    os.kill(int((attempt.work / "left").read_text()), signal.SIGKILL)
    assert "bad data" in attempt.stored_logs()[0]


def test_a_stop_while_the_store_does_not_respond_ends_within_the_pods_grace_period(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, WAITS)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(64)
        change(attempt, storageUri="s3://bucket", storageEndpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        attempt = replace(attempt, pod={"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY})
        launcher = attempt.start("--grace-seconds=2")
        deadline = time.monotonic() + 60
        while "attempt 1" not in attempt.log:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert launcher.wait(60) == ExitCode.INTERRUPTED
        assert time.monotonic() - began < 12  # of the grace period, 2 s, and what a pod has beyond it, 10 s
    assert attempt.result.cause is Cause.PREEMPTION
    assert "the end of this node's logs could not be stored within" in attempt.log


def test_in_s3_the_log_is_stored_with_mounted_credentials_that_are_never_printed(
    tmp_path: Path, s3_server: S3Server
) -> None:
    make_bucket(s3_server.endpoint, "logs-of-pods")
    attempt = make_attempt(tmp_path, DIES.replace("{death}", "os.kill(os.getpid(), 9)"))
    change(attempt, storageUri="s3://logs-of-pods/run", storageEndpoint=s3_server.endpoint)
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "accessKeyId").write_text(ACCESS_KEY)
    (folder / "secretAccessKey").write_text(SECRET_KEY)
    pod = {"STAGECOACH_CREDENTIALS_DIR": str(folder), "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    assert replace(attempt, pod=pod).run() == 137
    store = open_store("s3://logs-of-pods/run", endpoint=s3_server.endpoint)
    logs = [entry.key for entry in store.list(attempt_logs_prefix(DIGEST, "0001")) if "rank-00000." in entry.key]
    assert len(logs) == 1
    log = store.read(logs[0]).decode()
    assert "the last output of rank 0" in log
    assert SECRET_KEY not in log + attempt.log


REAPS = """
import ctypes, os, subprocess, sys, time
from stagecoach_trainer.launcher.__main__ import reap_orphans
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
child = subprocess.Popen([sys.executable, "-c", "import os; os.fork() or os._exit(0)"])
other = subprocess.Popen(["sh", "-c", "(sleep 0.1; exit 3) & exit 0"])
assert other.wait() == 0
time.sleep(0.4)
for _ in range(3):
    reap_orphans(child.pid)
assert child.wait() == 0
for _ in range(50):
    reap_orphans(child.pid)
    time.sleep(0.01)
children = open(f"/proc/self/task/{os.getpid()}/children").read()
assert children == "", children
reap_orphans(child.pid)
"""


def test_orphans_inherited_by_the_launcher_do_not_stay_as_zombies(tmp_path: Path) -> None:
    script = tmp_path / "reaps.py"
    script.write_text(REAPS)
    subprocess.run([sys.executable, script], check=True, timeout=60)
