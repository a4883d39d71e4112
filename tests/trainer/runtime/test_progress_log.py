"""The lines of an attempt's log that progress makes, under a clock of the test's own."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from stagecoach_trainer.runtime.progress import Progress


class Clock:
    """Seconds that pass only when a test adds them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> Progress:
    caplog.set_level(logging.INFO, logger="stagecoach_trainer")
    return Progress(tmp_path / "progress.jsonl", clock)


def step(progress: Progress, number: int, total: int) -> None:
    metrics = {"loss": 3.25, "learningRate": 2e-3, "tokensPerSecond": 18_234.4, "gradNorm": 0.5}
    progress.report("train", number, total, "steps", metrics)


def test_a_step_has_loss_rate_speed_and_the_time_left(
    progress: Progress, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The log of a slow run: a line at least every ten seconds, whatever the number of steps."""
    for number in range(1, 7):
        step(progress, number, 1000)
        clock.now += 4.0
    lines = [record.message for record in caplog.records]
    figures = "loss 3.25, rate 0.002, tokens/s 18,234, gradient norm 0.5"
    assert lines == [
        f"train: step 1 of 1,000, {figures}",
        f"train: step 4 of 1,000, {figures}, about 3,984 s left",
    ]


def test_a_fast_run_has_a_line_for_each_tenth_and_no_more(
    progress: Progress, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1, 501):
        clock.now += 0.001
        step(progress, number, 500)
    steps = [int(record.message.split()[2]) for record in caplog.records]
    assert steps == [1, *range(50, 501, 50)]


def test_every_activity_has_a_line_and_its_last_amount(
    progress: Progress, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    progress.report("load model")
    for number in (128, 256, 300):
        clock.now += 0.1
        progress.report("tokenise zh", number, unit="tokens")
    progress.report("fetch")
    progress.report("prepare")
    progress.report("publish", 1, 2, "files")
    assert [record.message for record in caplog.records] == [
        "load model",
        "tokenise zh: 128 tokens",
        "tokenise zh: 300 tokens",
    ]


def test_a_warning_is_logged_told_to_the_driver_and_kept_once(
    progress: Progress, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step(progress, 3, 10)
    for _ in range(2):
        progress.warn("the gradient norm rose")
    assert progress.warnings == ["the gradient norm rose"]
    assert [record.message for record in caplog.records][1:] == ["warning: the gradient norm rose"]
    events = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [item.get("warning") for item in events] == [None, "the gradient norm rose"]
    assert events[1]["done"] == 3, "the newest event still shows the step"


def test_other_ranks_write_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="stagecoach_trainer")
    progress = Progress(None)
    step(progress, 1, 2)
    assert caplog.records == []
