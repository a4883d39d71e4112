"""Suspending, cancelling and resuming a local run from another terminal than its driver's."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_core.values import RunState, StageState
from stagecoach_local.interrupts import CANCEL, SUSPEND, Interrupts
from tests.cli.makers import Bench, Cli, chain, data_stage

TIMEOUT = 120


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def test_a_suspended_run_stops_at_a_checkpoint_and_resumes_with_the_same_options(bench: Bench, cli: Cli) -> None:
    bench.write([data_stage("one"), data_stage("two") | {"after": ["one"]}], {"one": [{"seconds": 30}, {}]})
    driver = bench.stagecoach("run", "run.yaml", "--set", "metadata.name=other", "--storage", "kept", "--until", "one")
    bench.wait_for_event("start")
    assert cli("suspend", "other", "--wait") == (
        0,
        f"default/other: stopping at a checkpoint (process {driver.pid})\n"
        "default/other: stopped; resume with `stagecoach resume default/other`\n",
    )
    code, output = finish(driver)
    assert (
        code,
        "resume with `stagecoach run run.yaml --set metadata.name=other --storage kept --until one`" in output,
    ) == (130, True)
    record = bench.workspace.run("default", "other").load()
    assert record is not None
    assert (record.state, record.attempts[0].cause) == (RunState.SUSPENDED, Cause.PREEMPTION)
    code, output = finish(bench.stagecoach("resume", "other"))
    assert code == 0, output
    assert [(event["stage"], event["attempt"]) for event in bench.events("start")] == [("one", 1), ("one", 2)]
    assert (bench.folder / "kept" / "artifacts").is_dir()


def test_suspending_twice_kills_nothing(bench: Bench, cli: Cli) -> None:
    bench.write([data_stage("one")], {"one": {"seconds": 30, "stubborn": True}})
    driver = bench.stagecoach("run", "run.yaml")
    start = bench.wait_for_event("start")
    for _ in range(3):
        assert cli("suspend", "tiny")[0] == 0
    assert psutil.pid_exists(start["pid"])
    code, output = finish(driver)  # killed after its grace period
    assert code == 130
    assert output.count("stopping one at a checkpoint") == 1


def test_a_cancelled_run_is_shown_as_cancelled_and_can_be_resumed(bench: Bench, cli: Cli) -> None:
    bench.write([data_stage("one"), data_stage("two") | {"after": ["one"]}], {"one": [{"seconds": 30}, {}]})
    driver = bench.stagecoach("run", "run.yaml")
    bench.wait_for_event("start")
    code, output = cli("cancel", "tiny", "--wait")
    assert (code, output.splitlines()[-1]) == (0, "default/tiny: cancelled")
    code, output = finish(driver)
    assert (code, "cancelled" in output.splitlines()[-1]) == (130, True)
    assert {stage.state for stage in bench.record().stages.values()} == {StageState.CANCELLED}
    assert "default/tiny: cancelled" in cli("status", "tiny")[1]
    code, output = finish(bench.stagecoach("resume", "tiny"))
    assert code == 0, output
    assert bench.record().state is RunState.COMPLETE


def test_a_run_without_a_driver_is_recorded_as_cancelled(bench: Bench, cli: Cli) -> None:
    bench.write(chain())
    bench.drive(until="corpus")
    folder = bench.workspace.run("default", "tiny")
    folder.save(bench.record().model_copy(update={"state": RunState.SUSPENDED}))
    assert cli("cancel", "tiny") == (0, "default/tiny: cancelled\n")
    states = {name: stage.state for name, stage in bench.record().stages.items()}
    assert states["corpus"] is StageState.SUCCEEDED
    assert states["release"] is StageState.CANCELLED


def test_a_finished_run_stays_finished(bench: Bench, cli: Cli) -> None:
    bench.write([data_stage("one")])
    bench.drive()
    assert cli("cancel", "tiny") == (0, "default/tiny: complete\n")
    assert cli("suspend", "tiny")[1] == "default/tiny: not running; resume with `stagecoach resume default/tiny`\n"


def test_a_run_with_a_driver_cannot_be_resumed(bench: Bench, cli: Cli) -> None:
    bench.write([data_stage("one")], {"one": {"seconds": 30}})
    driver = bench.stagecoach("run", "run.yaml")
    bench.wait_for_event("start")
    code, output = finish(bench.stagecoach("resume", "tiny"))
    assert (code, f"another driver is working on this run: process {driver.pid}" in output) == (1, True)
    driver.send_signal(signal.SIGINT)
    finish(driver)


def test_a_run_without_its_file_cannot_be_resumed(bench: Bench, cli: Cli) -> None:
    bench.write([data_stage("one")])
    bench.drive()
    bench.file.unlink()
    code, output = cli("resume", "tiny")
    assert (code, f"{bench.file} does not exist" in output) == (2, True)


def test_a_run_whose_file_sets_cancel_starts_nothing(bench: Bench) -> None:
    bench.write([data_stage("one")], cancel=True)
    code, output = finish(bench.stagecoach("run", "run.yaml"))
    assert (code, output.splitlines()[-1]) == (130, "run `tiny` is cancelled; `spec.cancel` is true")
    assert bench.started() == []
    assert bench.record().state is RunState.CANCELLED


def test_watching_ends_with_the_driver(bench: Bench, cli: Cli) -> None:
    bench.write([data_stage("one")], {"one": {"seconds": 1.0}})
    driver = bench.stagecoach("run", "run.yaml")
    bench.wait_for_event("start")
    code, output = cli("status", "tiny", "--watch")
    assert code == 0
    assert "default/tiny: complete" in output
    finish(driver)


def test_repeated_suspend_and_cancel_signals_are_one_stop_and_each_ctrl_c_counts() -> None:
    with Interrupts() as interrupts:
        for number in (SUSPEND, SUSPEND, CANCEL):
            os.kill(os.getpid(), number)
        assert (interrupts.count, interrupts.cancelled) == (1, True)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.count == 2


def test_the_separate_log_of_a_rank_is_printed_if_it_exists(bench: Bench, cli: Cli) -> None:
    bench.write([data_stage("one")])
    bench.drive()
    logs = bench.workspace.run("default", "tiny").attempt("one", 1).path / "logs"
    logs.mkdir()
    (logs / "rank-00001.20261122T100500.000Z.log").write_text("of rank 1\n")
    assert cli("logs", "tiny", "one", "--rank", "1")[1].startswith("of rank 1\n")
    code, output = cli("logs", "tiny", "--rank", "2")
    assert (code, "has no log of rank 2" in output) == (2, True)
