"""The local driver with the real trainer: who is charged for an error, and how soon."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from stagecoach_api.outcomes import Cause
from stagecoach_core.values import StageState, StageView
from tests import ROOT
from tests.cli.makers import Bench, data_stage
from tests.trainer.makers import SITE

RAISES = """
import json
def run(config, context):
    json.loads("{")
"""


def drive(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> tuple[StageView, Bench]:
    """Run a stage whose module is `code` in real attempts."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    (folder / "site" / "stand_in.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "site"), str(ROOT)]))
    bench = Bench(folder)
    bench.write([data_stage("one")])
    launcher = (sys.executable, "-m", "stagecoach_trainer.launcher")
    return bench.drive(launcher=launcher).decision.stages["one"], bench


def test_an_unexpected_error_is_tried_twice_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, bench = drive(tmp_path, RAISES, monkeypatch)
    assert (view.state, view.attempt) == (StageState.FAILED, 2)
    assert view.restarts == {Cause.INFRASTRUCTURE: 1, Cause.USER: 1}
    lines = view.message.splitlines()
    assert lines[0].startswith("attempts 1 and 2 ended with the same error at the same place")
    assert "JSONDecodeError: Expecting property name" in lines[0]
    assert '  site/stand_in.py:4 in run: json.loads("{")' in lines
    assert any("stagecoach_trainer/run_stage.py" in line for line in lines)
    assert any("json/decoder.py" in line for line in lines)
    assert lines[-1].startswith("correct the setting, the data or the model")
    first, second = bench.record().attempts
    assert first.fault == second.fault
    assert first.fault.startswith("JSONDecodeError at stagecoach_trainer/run_stage.py:")


def test_a_missing_package_is_the_users_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """marin#4615: the package of a model's quantisation is not installed; it was tried nine times in eight minutes."""
    view, _ = drive(tmp_path, "def run(config, context):\n    import surely_not_installed\n", monkeypatch)
    assert (view.state, view.restarts) == (StageState.FAILED, {Cause.USER: 1})
    assert "No module named 'surely_not_installed'; install it where the trainer runs" in view.message


def test_a_trainer_that_dies_before_it_can_report_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = "import sys\nsys.modules['pydantic'] = None\n"
    monkeypatch.setattr("tests.local.test_recurring_errors.SITE", hidden)
    view, _ = drive(tmp_path, "", monkeypatch)
    assert (view.state, view.restarts) == (StageState.FAILED, {Cause.USER: 1})
    assert "pydantic" in view.message
