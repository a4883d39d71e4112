"""Two ranks on CPUs: replicated, ZeRO-2 and ZeRO-3 train, stop, resume bit for bit, and agree with one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from tests.trainer.loop.makers import RandomPlan, context, tiny_model, training
from tests.trainer.ranks import report_of_two_ranks

CASES = ("0-fp32", "2-fp32", "3-bf16")
MODULE = "tests.trainer.loop.ranks_worker"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of two ranks for all cases."""
    return report_of_two_ranks(MODULE, tmp_path_factory.mktemp("ranks"), *CASES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_resumes_and_ends_bit_for_bit_like_an_undisturbed_one(report: dict[str, Any], case: str) -> None:
    assert report[case]["resumed"]["weights"]
    assert report[case]["resumed"] == report[case]["whole"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["0-fp32", "2-fp32"])
def test_two_ranks_have_the_losses_of_one(report: dict[str, Any], case: str, tmp_path: Path) -> None:
    job = TrainingJob(tiny_model(), training(), RandomPlan(num_rows=5))
    alone = [point["loss"] for point in train(job, context(tmp_path)).history]
    assert report[case]["whole"]["losses"][0] == pytest.approx(alone[0], abs=1e-6)
    assert report[case]["whole"]["losses"] == pytest.approx(alone, abs=1e-5)


@pytest.mark.timeout(300)
def test_zero_3_in_bf16_stays_near_fp32(report: dict[str, Any]) -> None:
    assert report["3-bf16"]["whole"]["losses"] == pytest.approx(report["2-fp32"]["whole"]["losses"], abs=5e-2)
