"""Signals to the driver's process, its SIGKILL, and two drivers of a run: no work is lost, no process is left."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from stagecoach_api.outcomes import Cause
from tests.cli.makers import Bench, data_stage

TIMEOUT = 240


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def wait_until_gone(pid: int, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def test_ctrl_c_stops_at_a_checkpoint_with_130_and_the_same_command_resumes(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": [{"seconds": 30}, {}]})
    driver = bench.stagecoach("run", "run.yaml")
    start = bench.wait_for_event("start")
    driver.send_signal(signal.SIGINT)
    code, output = finish(driver)
    assert (code, bench.record().attempts[0].cause) == (130, Cause.PREEMPTION)
    assert "stopping one at a checkpoint; press Ctrl-C again to kill" in output
    assert "run `tiny` is interrupted; resume with `stagecoach run run.yaml" in output
    wait_until_gone(start["pid"])
    code, output = finish(bench.stagecoach("run", "run.yaml"))
    assert code == 0, output
    assert [event["attempt"] for event in bench.events("start")] == [1, 2]


def test_a_second_ctrl_c_kills_attempts_that_do_not_stop(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": {"seconds": 30, "stubborn": True}})
    driver = bench.stagecoach("run", "run.yaml")
    start = bench.wait_for_event("start")
    driver.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert psutil.pid_exists(start["pid"])
    driver.send_signal(signal.SIGINT)
    assert finish(driver)[0] == 130
    wait_until_gone(start["pid"])


def test_a_killed_driver_leaves_no_orphan_and_the_next_one_resumes(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": [{"seconds": 30}, {}]})
    driver = bench.stagecoach("run", "run.yaml")
    start = bench.wait_for_event("start")
    driver.kill()
    driver.communicate(timeout=TIMEOUT)
    wait_until_gone(start["pid"])
    code, output = finish(bench.stagecoach("run", "run.yaml"))
    assert code == 0, output
    first, second = bench.record().attempts
    assert (first.number, first.cause, first.last_step) == (1, Cause.PREEMPTION, 3)
    assert (second.number, second.cause) == (2, None)


def test_the_next_driver_ends_an_orphaned_attempt_before_it_starts_another(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": [{"seconds": 60, "stubborn": True}, {}]})
    driver = bench.stagecoach("run", "run.yaml")
    start = bench.wait_for_event("start")
    driver.kill()
    driver.communicate(timeout=TIMEOUT)
    assert psutil.pid_exists(start["pid"])
    code, output = finish(bench.stagecoach("run", "run.yaml"))
    assert code == 0, output
    assert "attempt 1 is still stopping, its driver was killed" in output
    wait_until_gone(start["pid"])
    first, second = bench.record().attempts
    assert (first.cause, second.cause) == (Cause.PREEMPTION, None)
    assert first.ended is not None
    assert first.ended <= second.started


def test_a_second_driver_of_the_same_run_names_the_holder_and_ends(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": {"seconds": 30}})
    first = bench.stagecoach("run", "run.yaml")
    bench.wait_for_event("start")
    code, output = finish(bench.stagecoach("run", "run.yaml"))
    assert code == 1
    assert f"another driver is working on this run: process {first.pid} since" in output
    first.send_signal(signal.SIGINT)
    finish(first)
    assert len(bench.events("start")) == 1


def test_another_run_of_the_same_folder_runs_at_the_same_time(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": [{"seconds": 30}]})
    first = bench.stagecoach("run", "run.yaml")
    bench.wait_for_event("start")
    (bench.folder / "data" / "one.txt").write_text("other text\n", encoding="utf-8")
    bench.follow({})
    code, output = finish(bench.stagecoach("run", "run.yaml", "--set", "metadata.name=other"))
    assert code == 0, output
    first.send_signal(signal.SIGINT)
    assert finish(first)[0] == 130


def test_a_failed_run_ends_with_1_and_shows_cause_log_and_last_lines(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": {"exit": 64, "message": "data/one.txt:1: malformed"}})
    code, output = finish(bench.stagecoach("run", "run.yaml"))
    assert code == 1
    log = bench.workspace.run("default", "tiny").attempt("one", 1).log
    for text in ("one failed (user × 1)", "data/one.txt:1: malformed", f"log: {log}", "| working on one"):
        assert text in output
