"""Fixtures of the training stages' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.stages.makers import Workshop


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A folder with the inputs of `pretrain` and `sft` stages, in which they run."""
    return Workshop(tmp_path)
