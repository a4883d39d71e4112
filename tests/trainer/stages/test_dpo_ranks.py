"""KTO on two ranks, replicated and under ZeRO-3: the same figures as on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_makers import make_tokenizer, save_base

HERE = Path(__file__).parent
STAGES = ("0", "3")
WORDS = ("dog", "fox", "word", "task", "model", "quick", "lazy", "next", "brown", "over")


def write_labels(path: Path, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    lines = (
        {"prompt": " ".join(random.choice(WORDS, 2)), "completion": " ".join(random.choice(WORDS, 4)), "label": odd}
        for odd in (bool(number % 2) for number in range(count))
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.timeout(300)
def test_two_ranks_have_the_figures_of_one(tmp_path: Path) -> None:
    save_base(tmp_path / "base", make_tokenizer())
    save_base(tmp_path / "other", make_tokenizer(), seed=5)
    write_labels(tmp_path / "train", 7, seed=1)
    write_labels(tmp_path / "test", 5, seed=2)
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "dpo_ranks_worker.py"), str(tmp_path), *STAGES],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=(tmp_path / f"{rank}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], "\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    report = json.loads((tmp_path / "report.json").read_text())
    for stage in STAGES:
        assert report[stage] == pytest.approx(report["alone"], abs=1e-5), stage
