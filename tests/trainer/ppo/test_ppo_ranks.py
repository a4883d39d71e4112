"""PPO on two ranks on CPUs: replicated, ZeRO-2 and ZeRO-3 train, stop, resume bit for bit, and agree with one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.loop.makers import context
from tests.trainer.ppo.makers import ranks_configuration, run_to_end
from tests.trainer.ranks import report_of_two_ranks

CASES = ("0-fp32", "2-fp32", "3-fp32", "3-bf16")
MODULE = "tests.trainer.ppo.ppo_ranks_worker"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of two ranks for all cases."""
    return report_of_two_ranks(MODULE, tmp_path_factory.mktemp("ranks"), *CASES, "judge")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of two ranks with a policy that answers from copies and from its shards."""
    report = report_of_two_ranks(MODULE, tmp_path_factory.mktemp("shards"), "shards")
    shards: dict[str, Any] = report["shards"]
    return shards


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_ranks_stopped_during_generation_resume_and_end_bit_for_bit_like_undisturbed_ones(
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


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_reward_model_gives_bit_identical_rewards_in_half_the_memory(
    report: dict[str, Any], precision: str
) -> None:
    whole, shared = report["judge"][precision]
    assert [[len(part) for part in rank] for rank in shared["rewards"]] == [[7, 0, 1, 0], [2, 4, 0, 0]]
    assert len(set(shared["rewards"][0][0])) > 3
    assert shared["rewards"] == whole["rewards"]
    assert shared["bytes"] == pytest.approx(whole["bytes"] / 2, rel=0.02)


@pytest.mark.timeout(300)
def test_ppo_learns_from_a_reward_model_that_ranks_share_as_from_a_whole_one(report: dict[str, Any]) -> None:
    whole, shared = report["judge"]["history"].values()
    assert shared[0]["reward"] == whole[0]["reward"] != 0.0
    for found, expected in zip(shared, whole, strict=True):
        assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_policy_answers_through_its_shards_what_its_copy_answers(answers: dict[str, Any], kind: str) -> None:
    copied, shared = answers[kind]
    assert (copied.pop("copies"), shared.pop("copies")) == (1, 0)
    assert 0.0 < copied["history"][0]["endedShare"] < 1.0  # some rows continue while others are done
    assert copied["history"][0]["reward"] != copied["history"][-1]["reward"]
    assert shared == copied


def test_ranks_go_back_together_to_a_checkpoint_from_before_the_sign(tmp_path: Path) -> None:
    found = report_of_two_ranks(MODULE, tmp_path, "guards")["guards"]
    first, second = found["told"]
    assert first == second
    assert "update 4: KL explosion" in first  # since update 3, whose answers are the first of a policy that has learnt
    assert "for 2 updates" in first
    assert found["checkpoints"] == ["step-00000001-0001", "step-00000003-0001"]
