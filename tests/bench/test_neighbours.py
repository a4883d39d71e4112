"""The bench with neighbours: they keep cores busy and end with it, and a side reports its speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from bench import neighbours
from bench.__main__ import BENCHES
from stagecoach_trainer.runtime.threads import PASSIVE, thread_environment


def test_neighbours_are_busy_and_end_with_the_bench() -> None:
    with neighbours.busy_neighbours(2) as pids:
        processes = [psutil.Process(pid) for pid in pids]
        for process in processes:
            while sum(process.cpu_times()[:2]) < 0.05:
                process.cpu_percent(0.01)
    assert not [process for process in processes if process.is_running()]
    assert "neighbours" in BENCHES


def test_a_side_reports_its_tokens_per_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["neighbours", "ours", "SFT, half masked", str(tmp_path / "run"), "3"])
    neighbours.main()
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["tokensPerSecond"] > 0


def test_ours_waits_as_a_rank_does() -> None:
    assert thread_environment({}, 1).items() >= PASSIVE.items()
