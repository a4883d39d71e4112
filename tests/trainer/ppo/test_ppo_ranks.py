"""PPO on two ranks on CPUs: replicated, ZeRO-2 and ZeRO-3 train, stop, resume bit for bit, and agree with one rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ppo_makers import ranks_configuration, run_to_end
from train_makers import context

CASES = ("0-fp32", "2-fp32", "3-fp32", "3-bf16")
HERE = Path(__file__).parent
TIMEOUT_SECONDS = 280


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks made of all cases, in one pair of processes: starting one costs more than training."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ppo_ranks_worker.py"), str(folder), *CASES],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=(folder / f"{rank}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(TIMEOUT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    result: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return result


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_ranks_stopped_while_they_answer_go_on_and_end_bit_for_bit_like_undisturbed_ones(
    report: dict[str, Any], case: str
) -> None:
    assert report[case]["resumed"]["policy"]
    assert report[case]["resumed"] == report[case]["whole"]


@pytest.mark.timeout(300)
def test_two_ranks_have_the_figures_of_one_however_they_share(report: dict[str, Any], tmp_path: Path) -> None:
    alone = run_to_end(context(tmp_path), ranks_configuration("0-fp32"))["history"]
    for case in ("0-fp32", "2-fp32", "3-fp32"):
        for found, expected in zip(report[case]["whole"]["history"], alone, strict=True):
            assert found == pytest.approx(expected, abs=2e-4), case


@pytest.mark.timeout(300)
def test_zero_3_in_bf16_starts_near_fp32(report: dict[str, Any]) -> None:
    first, expected = (report[case]["whole"]["history"][0] for case in ("3-bf16", "3-fp32"))
    assert first["entropy"] == pytest.approx(expected["entropy"], abs=5e-2)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # policy and reference are cast alike
