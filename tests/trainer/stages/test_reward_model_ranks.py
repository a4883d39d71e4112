"""A reward model on two ranks, replicated and sharded: the same figures, and the same rewards, as on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach_trainer.runtime.context import World
from tests.trainer.align.makers import write_rankings
from tests.trainer.models.makers import make_tokenizer, save_base
from tests.trainer.ranks import report_of_two_ranks
from tests.trainer.stages import reward_model_ranks_worker

STAGES = ("0", "2", "3")


@pytest.mark.timeout(300)
def test_two_ranks_train_the_reward_model_of_one(tmp_path: Path) -> None:
    save_base(tmp_path / "base", make_tokenizer())
    write_rankings(tmp_path / "train", 7, seed=1)
    write_rankings(tmp_path / "test", 5, seed=2)
    report = report_of_two_ranks(reward_model_ranks_worker.__name__, tmp_path, *STAGES)
    alone = reward_model_ranks_worker.result_of(tmp_path, "alone", World())
    assert len({alone[f"reward.{index}"] for index in range(3)}) == 3
    for stage in STAGES:
        assert report[stage] == pytest.approx(alone, abs=1e-5), stage
