"""A reward model on two ranks, replicated and sharded: the same figures, and the same rewards, as on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.align.makers import write_rankings
from tests.trainer.models.makers import make_tokenizer, save_base
from tests.trainer.ranks import report_of_two_ranks

HERE = Path(__file__).parent
STAGES = ("0", "2", "3")


@pytest.mark.timeout(300)
def test_two_ranks_train_the_reward_model_of_one(tmp_path: Path) -> None:
    save_base(tmp_path / "base", make_tokenizer())
    write_rankings(tmp_path / "train", 7, seed=1)
    write_rankings(tmp_path / "test", 5, seed=2)
    report = report_of_two_ranks(HERE / "reward_model_ranks_worker.py", tmp_path, *STAGES)
    assert len({report["alone"][f"reward.{index}"] for index in range(3)}) == 3
    for stage in STAGES:
        assert report[stage] == pytest.approx(report["alone"], abs=1e-5), stage
