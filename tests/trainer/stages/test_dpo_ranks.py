"""KTO on two ranks, replicated and under ZeRO-3: the same figures as on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach_trainer.runtime.context import World
from tests.trainer.align.makers import write_labels
from tests.trainer.models.makers import make_tokenizer, save_base
from tests.trainer.ranks import report_of_two_ranks
from tests.trainer.stages import dpo_ranks_worker

STAGES = ("0", "3")


@pytest.mark.timeout(300)
def test_two_ranks_have_the_figures_of_one(tmp_path: Path) -> None:
    save_base(tmp_path / "base", make_tokenizer())
    save_base(tmp_path / "other", make_tokenizer(), seed=5)
    write_labels(tmp_path / "train", 7, seed=1)
    write_labels(tmp_path / "test", 5, seed=2)
    report = report_of_two_ranks(dpo_ranks_worker.__name__, tmp_path, *STAGES)
    alone = dpo_ranks_worker.metrics_of(tmp_path, "alone", World())
    for stage in STAGES:
        assert report[stage] == pytest.approx(alone, abs=1e-5), stage
