"""Our event files against TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from stagecoach_trainer.train.eventfile import EventFile, crc32c


def test_the_check_sum_is_crc_32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.scalars(1, {"loss": 2.5, "learningRate": 1e-3})
    file.scalars(300, {"loss": 1.25})
    file.close()
    (path,) = tmp_path.iterdir()
    found = [
        (event.step, value.tag, value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value)
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]
    assert found == [(1, "loss", 2.5), (1, "learningRate", pytest.approx(1e-3)), (300, "loss", 1.25)]
