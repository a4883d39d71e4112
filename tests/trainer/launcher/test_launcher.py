"""The launcher and its workers as processes: every ending gives the right exit code and result file."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import hypothesis.strategies as st
import psutil
import pytest
from hypothesis import given

from stagecoach_api.artifacts import Manifest, manifest_key
from stagecoach_api.outcomes import MAX_WARNINGS, AttemptResult, Cause, ExitCode
from stagecoach_trainer.launcher.__main__ import worker_command
from stagecoach_trainer.runtime.attempt_files import replace_file
from stagecoach_trainer.runtime.outcomes import (
    MAX_RESULT_BYTES,
    RankOutcome,
    combine,
    failure,
    read_outcomes,
    serialise,
    torchrun_deaths,
    with_warnings,
)
from tests.trainer.makers import DIGEST, Attempt, make_attempt

WRITES = """
from stagecoach_trainer.runtime.context import StageOutcome
def run(config, context):
    context.progress.warn("3 records have a field `weight`, which is not read")
    (context.output / "report.json").write_text('{"warnings": ["the vocabulary has 3 unused rows"]}')
    return StageOutcome(tokens=5, metrics={"loss": 1.5})
"""
RAISES = """
from stagecoach_trainer.runtime.errors import UserError
def run(config, context):
    raise UserError("data.sources[0].uri: corpus.jsonl is empty; give records")
"""
DISK_IS_FULL = """
import errno
def run(config, context):
    raise OSError(errno.ENOSPC, "No space left on device", str(context.output / "part-00000"))
"""
BUG = """
def run(config, context):
    return {}["missing"]
"""
KILLED = """
import os, signal
def run(config, context):
    context.progress.warn("the loss of packed rows leaks; rows are not packed")
    os.kill(os.getpid(), signal.SIGKILL)
"""
WAITS = """
import time
def run(config, context):
    context.progress.report("read")
    time.sleep(600)
"""


def wait_for_progress(attempt: Attempt, activity: str, done: float, seconds: float = 150.0) -> None:
    """Wait until the progress file reports that `activity` has reached `done`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lines = attempt.progress.read_text().splitlines() if attempt.progress.exists() else []
        events = [json.loads(line) for line in lines]
        if any(event["activity"] == activity and event.get("done", 0) >= done for event in events):
            return
        time.sleep(0.05)
    raise TimeoutError(attempt.log)


def test_a_completed_stage_is_published_with_its_manifest_last(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, WRITES)
    assert attempt.run() == 0, attempt.log
    manifest = Manifest.model_validate_json((attempt.store / manifest_key(DIGEST)).read_bytes())
    assert attempt.result.exit_code == ExitCode.DONE
    assert attempt.result.content_digest == manifest.content_digest
    assert manifest.tokens == 5
    assert manifest.environment["threads"] == 1
    assert attempt.result.warnings == (
        "3 records have a field `weight`, which is not read",
        "the vocabulary has 3 unused rows",
    )


@pytest.mark.parametrize(
    ("code", "exit_code", "cause", "message"),
    [
        pytest.param(RAISES, 64, Cause.USER, "corpus.jsonl is empty; give records", id="an error of the run"),
        pytest.param(DISK_IS_FULL, 74, Cause.INFRASTRUCTURE, "disk full: .*part-00000", id="a full disk"),
        pytest.param(BUG, 1, Cause.INFRASTRUCTURE, "KeyError: 'missing'\n.*stand_in.py:3 in run", id="a bug"),
        pytest.param(KILLED, 137, Cause.INFRASTRUCTURE, "killed by signal 9.*memory", id="kill -9"),
    ],
)
def test_a_failed_attempt_reports_why(tmp_path: Path, code: str, exit_code: int, cause: Cause, message: str) -> None:
    attempt = make_attempt(tmp_path, code)
    assert attempt.run() == exit_code
    assert attempt.result.cause is cause
    assert re.search(message, attempt.result.message, re.DOTALL), attempt.result.message
    told = ("the loss of packed rows leaks; rows are not packed",) if code == KILLED else ()
    assert attempt.result.warnings == told


def test_a_wrong_configuration_fails_before_heavy_imports(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, "raise RuntimeError('imported')", config={"sources": [], "colour": "red"})
    assert attempt.run() == ExitCode.USER_ERROR
    assert "sources" in attempt.result.message
    assert "colour" in attempt.result.message
    assert "imported" not in attempt.log


@pytest.mark.parametrize("way", ["sigterm", "end of standard input"])
def test_asked_to_stop_a_stage_without_checkpoints_ends_at_once(tmp_path: Path, way: str) -> None:
    attempt = make_attempt(tmp_path, WAITS)
    launcher = attempt.start()
    wait_for_progress(attempt, "read", 0)
    if way == "sigterm":
        launcher.send_signal(signal.SIGTERM)
    else:
        assert launcher.stdin is not None
        launcher.stdin.close()
    assert launcher.wait(30) == ExitCode.INTERRUPTED
    assert attempt.result.cause is Cause.PREEMPTION


def test_workers_stop_when_their_launcher_is_killed(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, WAITS)
    launcher = attempt.start()
    wait_for_progress(attempt, "read", 0)
    worker = int((attempt.work / "outcomes" / "rank-00000.pid").read_text())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (attempt.work / "outcomes" / "rank-00000.json").exists():
        time.sleep(0.05)
    assert read_outcomes(attempt.work)[0].result.exit_code == ExitCode.INTERRUPTED
    psutil.wait_procs([psutil.Process(worker)] if psutil.pid_exists(worker) else [], timeout=30)
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


def test_several_ranks_run_under_torchrun_and_one_does_not() -> None:
    assert "torch.distributed.run" not in worker_command(1, 1, 300, {})
    several = worker_command(1, 4, 300, {})
    assert {"--nproc-per-node=4", "--standalone", "--max-restarts=0", "--shutdown-timeout=300"} <= set(several)


def test_on_several_nodes_the_rank_is_the_pods_index() -> None:
    environment = {"PET_NODE_RANK": "3", "PET_MASTER_ADDR": "pod-0"}
    command = worker_command(16, 8, 300, environment)
    assert {"--nnodes=16", "--node-rank=3", "--master-addr=pod-0", "--master-port=29500"} <= set(command)


def outcome(code: int, named: bool, at: float, message: str = "") -> RankOutcome:
    return RankOutcome(failure(code, message), named, at)


def test_the_first_named_failure_is_the_reason() -> None:
    outcomes = {
        0: outcome(1, False, 1.0, "connection closed by peer"),
        1: outcome(64, True, 2.0, "bad data"),
        2: outcome(66, True, 3.0, "loss is nan"),
    }
    assert combine(outcomes, range(3), 1).message == "bad data"


def test_a_rank_without_outcome_explains_unnamed_failures() -> None:
    outcomes = {0: outcome(1, False, 1.0, "connection closed by peer")}
    assert "rank 1 ended without reporting a reason" in combine(outcomes, range(2), 1).message


def test_exit_codes_of_workers_are_read_from_torchruns_output() -> None:
    text = b"""
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_11:00:00
  host      : pod-1
  rank      : 1 (local_rank: 0)
  exitcode  : -9 (pid: 42)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 42
"""
    assert torchrun_deaths(text) == {42: -9}
    assert torchrun_deaths(b"exit") == {}


def test_an_attempt_is_done_if_all_workers_are() -> None:
    done = RankOutcome(AttemptResult(exit_code=0, content_digest="ab"), True, 1.0)
    other = RankOutcome(AttemptResult(exit_code=0), True, 0.5)
    assert combine({0: done, 1: other}, range(2), 0).content_digest == "ab"


def test_a_long_message_is_cut_in_the_middle_to_fit_a_termination_message() -> None:
    result = failure(64, "错误" * 1200 + "end")
    assert len(serialise(result)) <= MAX_RESULT_BYTES
    assert AttemptResult.model_validate_json(serialise(result)).message.endswith("错误") or "…" in result.message


@given(
    message=st.text(max_size=2500),
    warnings=st.lists(st.text(max_size=600), max_size=30, unique=True),
)
def test_warnings_fit_next_to_the_message_and_all_are_counted(message: str, warnings: list[str]) -> None:
    plain = failure(64, message)
    result = with_warnings(plain, warnings)
    assert len(serialise(result)) <= MAX_RESULT_BYTES
    assert len(result.warnings) <= MAX_WARNINGS
    *shown, last = result.warnings or ("",)
    more = re.fullmatch(r"and (\d+) more warnings?; .*", last)
    shown = shown if more else list(result.warnings)
    assert len(shown) + (int(more[1]) if more else 0) == len(warnings)
    assert all(whole.startswith(text.removesuffix("…")) for text, whole in zip(shown, warnings, strict=False))
    assert result.message == plain.message or not shown


def test_a_few_warnings_are_kept_as_they_are() -> None:
    told = [f"warning {number}" for number in range(MAX_WARNINGS)]
    assert with_warnings(failure(64, "bad data"), told).warnings == tuple(told)
    more = "and 2 more warnings; the stage's log and report.json list all"
    assert with_warnings(failure(64, "bad data"), [*told, "last"]).warnings == (*told[:-1], more)


def test_a_file_that_cannot_be_replaced_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", refuse)
    path = tmp_path / "termination-log"
    replace_file(path, b"{}")
    assert path.read_bytes() == b"{}"
    assert [item.name for item in tmp_path.iterdir()] == ["termination-log"]
