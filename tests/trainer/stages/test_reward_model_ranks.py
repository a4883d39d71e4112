"""A reward model on two ranks, replicated and sharded: the same figures, and the same rewards, as on one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from model_makers import make_tokenizer, save_base
from ranks_makers import report_of_two_ranks

HERE = Path(__file__).parent
STAGES = ("0", "2", "3")
WORDS = ("dog", "fox", "word", "task", "model", "quick", "lazy", "next", "brown", "over")


def write_rankings(path: Path, count: int, seed: int) -> None:
    """Write prompts with two to four answers each, the best first."""
    random = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        answers = [" ".join(random.choice(WORDS, 2 + place)) for place in range(2 + number % 3)]
        lines.append({"prompt": " ".join(random.choice(WORDS, 2)), "answers": answers})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.timeout(300)
def test_two_ranks_train_the_reward_model_of_one(tmp_path: Path) -> None:
    save_base(tmp_path / "base", make_tokenizer())
    write_rankings(tmp_path / "train", 7, seed=1)
    write_rankings(tmp_path / "test", 5, seed=2)
    report = report_of_two_ranks(HERE / "reward_model_ranks_worker.py", tmp_path, *STAGES)
    assert len({report["alone"][f"reward.{index}"] for index in range(3)}) == 3
    for stage in STAGES:
        assert report[stage] == pytest.approx(report["alone"], abs=1e-5), stage
