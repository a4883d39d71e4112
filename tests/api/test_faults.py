"""Errors read from the log of a process that left no result, and texts that are shortened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stagecoach_api.faults import FRAMES, Frame, result_of_log, short_path, shortened, unnamed_message
from stagecoach_api.outcomes import AttemptResult, Cause

BROKEN = """
def load(path):
    raise ValueError(f"cannot load {path}")
try:
    {}["x"]
except KeyError:
    load("weights")
"""
TORCHRUN = """Traceback (most recent call last):
  File "/venv/bin/torchrun", line 8, in <module>
    sys.exit(main())
  File "/venv/lib/site-packages/torch/distributed/run.py", line 5, in run
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
stagecoach_trainer FAILED
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  exitcode  : 1 (pid: 42)
"""


def log_of(code: str, tmp_path: Path) -> tuple[int, str]:
    """Run a program of its own; return its exit code and output."""
    (tmp_path / "program.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-S", str(tmp_path / "program.py")], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def test_the_last_error_of_a_dead_process_is_its_result(tmp_path: Path) -> None:
    code, log = log_of(BROKEN, tmp_path)
    result = result_of_log(code, f"earlier lines\n{log}")
    assert result is not None
    assert (result.exit_code, result.cause) == (1, Cause.INFRASTRUCTURE)
    assert result.message.startswith("ValueError: cannot load weights\n")
    assert "program.py:3 in load" in result.message
    assert result.fault == f"ValueError at {tmp_path.name}/program.py:3 in load"
    assert result_of_log(code, f"{log}{TORCHRUN}") == result, "torchrun's own error follows its worker's"


def test_a_missing_package_is_the_users_at_once(tmp_path: Path) -> None:
    """LLaMA-Factory#10374: a package that a model needs is not installed."""
    code, log = log_of("import surely_not_installed", tmp_path)
    result = result_of_log(code, log)
    assert result is not None
    assert result.cause is Cause.USER
    assert "No module named 'surely_not_installed'" in result.message
    assert "install it where the trainer runs" in result.message
    python = result_of_log(1, "/venv/bin/python: No module named stagecoach_trainer\n")
    assert python is not None
    assert python.cause is Cause.USER


@pytest.mark.parametrize(
    ("code", "log"),
    [(-9, "Traceback (most recent call last):"), (1, "all is well\nError"), (1, ""), (1, TORCHRUN), (0, "")],
)
def test_a_process_without_a_traceback_of_its_own_has_no_fault(code: int, log: str) -> None:
    assert result_of_log(code, log) is None


def test_a_traceback_that_was_only_logged_long_before_the_end_is_not_the_reason(tmp_path: Path) -> None:
    _, log = log_of(BROKEN, tmp_path)
    assert result_of_log(3, log + "step 7\n" * 40) is None


def test_a_result_of_a_newer_trainer_and_one_of_an_older_are_read() -> None:
    newer = AttemptResult.model_validate_json('{"exitCode": 1, "fault": "X at y", "humidity": 3}')
    assert newer.fault == "X at y"
    assert AttemptResult.model_validate_json('{"exitCode": 1}').fault is None


def test_long_texts_keep_both_ends() -> None:
    text = shortened("begin" + "x" * 500 + "end", 100)
    assert len(text) == 100
    assert text.startswith("begin")
    assert text.endswith("end")
    assert shortened("short", 5) == "short"


def test_a_message_has_the_last_frames_and_what_to_do() -> None:
    frames = [Frame(f"/x/site-packages/torch/a{index}.py", index, "f", "y = g(x)") for index in range(20)]
    lines = unnamed_message("TypeError", "bad", frames).splitlines()
    assert lines[0] == "TypeError: bad"
    assert lines[FRAMES] == "  torch/a19.py:19 in f: y = g(x)"
    assert len(lines) == FRAMES + 2


def test_paths_begin_at_their_package() -> None:
    assert short_path("/a/lib/python3.11/site-packages/torch/nn/linear.py") == "torch/nn/linear.py"
    assert short_path("/src/trainer/stagecoach_trainer/loop/loop.py") == "stagecoach_trainer/loop/loop.py"
    assert short_path("/srv/site/stand_in.py") == "site/stand_in.py"
