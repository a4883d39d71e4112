"""Plans: budgets, phases, batches and rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.kinds.pretrain import PretrainStage
from stagecoach_api.training import Schedule
from stagecoach_trainer.batches.rows import IGNORE, Row
from stagecoach_trainer.batches.schedule import StepSchedule
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.plan import MixedPlan, Planner, cut_into_pieces, phase_schedules, phase_settings
from stagecoach_trainer.samples.token_cache import TokenShard

BOS, EOS = 1, 2


def make_shard(lengths: list[int], first: int = 10, masked: bool = False) -> TokenShard:
    """Return a shard whose tokens are all different, so that each can be identified."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(first, first + offsets[-1], dtype=np.int32)
    trained = tokens % 2 == 0 if masked else None
    return TokenShard(tokens, trained, offsets, {"samples": len(lengths)})


def make_config(**changes: Any) -> PretrainStage:
    values: dict[str, Any] = {
        "model": {"uri": "m"},
        "data": [{"uri": "a", "name": "a"}],
        "sequenceLength": 16,
        "batch": {"tokens": 64},
        "optimizer": {"learningRate": 1.0},
    }
    return PretrainStage.model_validate({**values, **changes})


def make_plan(shards: dict[str, TokenShard], seed: int = 3, packing: bool = True, **changes: Any) -> MixedPlan:
    config = make_config(**changes)
    settings = phase_settings(config, list(shards), config.phases)
    return Planner(shards, seed, packing).plan(settings)


def make_schedule(plan: MixedPlan, **changes: Any) -> StepSchedule:
    """The schedule of a plan that was made with the same changes."""
    config = make_config(**changes)
    return StepSchedule.of(config, plan.num_steps, phase_schedules(plan, config.phases))


def all_rows(plan: MixedPlan) -> list[Row]:
    return [row for step in range(plan.num_steps) for row in plan.rows(step)]


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.booleans())
def test_one_epoch_predicts_every_token_once_however_documents_are_split(lengths: list[int], masked: bool) -> None:
    shard = make_shard(lengths, masked=masked)
    rows = all_rows(make_plan({"a": shard}))
    predicted = Counter(int(label) for row in rows for label in row.labels if label != IGNORE)
    firsts = set(shard.tokens[shard.offsets[:-1]].tolist())
    expected = [
        int(token)
        for index, token in enumerate(shard.tokens)
        if int(token) not in firsts and (shard.trained is None or shard.trained[index])
    ]
    assert predicted == Counter(expected)
    for row in rows:
        assert sum(row.lengths) == len(row.tokens) == len(row.labels) <= 16
        known = row.labels != IGNORE
        assert (row.labels[known] == row.tokens[known] + 1).all()


def test_the_last_position_of_a_sample_does_not_predict_the_next_sample() -> None:
    row = all_rows(make_plan({"a": make_shard([5, 6])}))[0]
    ends = np.cumsum(row.lengths) - 1
    assert (row.labels[ends] == IGNORE).all()


def test_pieces_of_a_long_document_are_contiguous() -> None:
    pieces = cut_into_pieces([make_shard([33, 16, 17, 1])], 16)
    assert list(zip(pieces.start.tolist(), pieces.length.tolist(), strict=True)) == [
        (0, 16),
        (16, 16),
        (33, 16),
        (49, 16),
        (66, 1),
    ]
    assert pieces.continues.tolist() == [True, True, False, True, False]


def test_a_step_does_not_depend_on_the_steps_requested_before() -> None:
    shards = {"a": make_shard([7, 9, 20, 3] * 20), "b": make_shard([4, 4, 30] * 9, first=5000)}
    changes: dict[str, Any] = {
        "data": [{"uri": "a", "name": "a", "weight": 3}, {"uri": "b", "name": "b", "weight": 1}],
        "budget": {"steps": 40},
    }
    one, two = make_plan(shards, **changes), make_plan(shards, **changes)
    forward = [[row.tokens.tolist() for row in one.rows(step)] for step in range(40)]
    backward = [[row.tokens.tolist() for row in two.rows(step)] for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert forward != [[row.tokens.tolist() for row in make_plan(shards, seed=4, **changes).rows(s)] for s in range(40)]


def test_weights_are_shares_of_the_tokens() -> None:
    shards = {"a": make_shard([15] * 400), "b": make_shard([9] * 300, first=100_000)}
    plan = make_plan(
        shards,
        data=[{"uri": "a", "name": "a", "weight": 1}, {"uri": "b", "name": "b", "weight": 1}],
        budget={"tokens": 12_000},
    )
    tokens = np.concatenate([row.tokens for row in all_rows(plan)])
    share = np.mean(tokens >= 100_000)
    assert abs(share - 0.5) < 0.005
    assert 12_000 <= len(tokens) < 12_000 + 2 * 64


@pytest.mark.parametrize(
    ("budget", "steps", "last_rows"),
    [
        ({"epochs": 1}, 13, 2),
        ({"epochs": 2}, 25, 4),
        ({"epochs": 0.1}, 2, 1),
        ({"steps": 7}, 7, 4),
        ({"tokens": 321}, 6, 4),
    ],
)
def test_budgets(budget: dict[str, float], steps: int, last_rows: int) -> None:
    plan = make_plan({"a": make_shard([16] * 50)}, budget=budget)
    assert plan.num_steps == steps
    assert [len(plan.rows(step)) for step in range(steps)] == [4] * (steps - 1) + [last_rows]
    with pytest.raises(IndexError):
        plan.rows(steps)


def test_a_batch_smaller_than_a_row_is_one_row() -> None:
    assert len(make_plan({"a": make_shard([16] * 50)}, batch={"tokens": 8}).rows(0)) == 1


def test_a_batch_of_samples_is_packed_into_as_few_rows_as_possible() -> None:
    plan = make_plan({"a": make_shard([4] * 50)}, batch={"samples": 10})
    assert [sum(len(row.lengths) for row in plan.rows(step)) for step in range(5)] == [10] * 5
    assert [len(plan.rows(step)) for step in range(5)] == [3] * 5
    seen = sorted(int(token) for row in all_rows(plan) for token in row.tokens)
    assert seen == list(range(10, 210))


@pytest.mark.parametrize("batch", [{"samples": 6}, {"tokens": 96}])
def test_without_packing_a_row_has_one_sample(batch: dict[str, int]) -> None:
    plan = make_plan({"a": make_shard([4, 9] * 9)}, packing=False, batch=batch)
    assert [[len(row.lengths) for row in plan.rows(step)] for step in range(3)] == [[1] * 6] * 3


def test_phases_have_their_own_length_batch_mix_rate_and_base() -> None:
    shards = {"a": make_shard([32] * 64), "b": make_shard([32] * 64, first=10_000)}
    changes: dict[str, Any] = {
        "data": [{"uri": "a", "name": "a"}, {"uri": "b", "name": "b"}],
        "schedule": {"name": "constant"},
        "phases": [
            {"name": "short", "tokens": 640},
            {"name": "long", "tokens": 1280, "sequenceLength": 32, "batchTokens": 128, "learningRate": 0.5,
             "weights": [{"name": "b", "weight": 1}], "ropeTheta": 50000},
            {"name": "end", "tokens": 320},
        ],
    }  # fmt: skip
    plan = make_plan(shards, **changes)
    schedule = make_schedule(plan, **changes)
    assert plan.num_steps == 10 + 10 + 5
    named = [(phase.settings.name, phase.first_step) for phase in plan.phases]
    assert named == [("short", 0), ("long", 10), ("end", 20)]
    assert [phase.settings.sequence_length for phase in plan.phases] == [16, 32, 16]
    assert [max(row.num_tokens for row in plan.rows(step)) for step in (9, 10, 19, 20)] == [16, 32, 32, 16]
    assert [schedule.learning_rate(step) for step in (0, 9, 10, 19, 20)] == [1.0, 1.0, 0.5, 0.5, 1.0]
    assert [schedule.rope_theta(step) for step in (0, 9, 10, 20)] == [None, None, 50000, 50000]
    long = np.concatenate([row.tokens for step in range(10, 20) for row in plan.rows(step)])
    assert long.min() >= 10_000
    assert len(plan.rows(10)) == 4
    seen = Counter(int(t) for step in (*range(10), *range(20, 25)) for row in plan.rows(step) for t in row.tokens)
    assert max(seen.values()) == 1, "the last phase continues where the first ended"


def test_a_phase_with_its_own_rate_has_its_own_schedule() -> None:
    changes: dict[str, Any] = {
        "schedule": {"name": "linear", "warmupSteps": 2},
        "phases": [{"name": "x", "tokens": 640}, {"name": "y", "tokens": 640, "learningRate": 3.0}],
    }
    schedule = make_schedule(make_plan({"a": make_shard([16] * 400)}, **changes), **changes)
    rates = [schedule.learning_rate(step) for step in range(20)]
    assert rates[2] == 1.0
    assert rates[12] == 3.0
    assert rates[9] > 0.5
    assert rates[19] == pytest.approx(3.0 / 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"uri": "a", "name": "a", "weight": 1}, {"uri": "b", "name": "b"}]}, "b has none"),
        (
            {"data": [{"uri": "a", "name": "a", "weight": 0}, {"uri": "b", "name": "b", "weight": 0}]},
            "every weight is 0",
        ),
        ({"phases": [{"name": "p", "tokens": 9, "weights": [{"name": "c", "weight": 1}]}]}, "'c'"),
    ],
)
def test_weights_that_form_no_mix_are_rejected(changes: dict[str, Any], message: str) -> None:
    data = {"data": [{"uri": "a", "name": "a"}, {"uri": "b", "name": "b"}]}
    with pytest.raises(UserError, match=message):
        make_plan({"a": make_shard([9]), "b": make_shard([9])}, **{**data, **changes})


def test_a_set_with_weight_but_without_samples_is_rejected() -> None:
    data = [{"uri": "a", "name": "a", "weight": 1}, {"uri": "b", "name": "b", "weight": 1}]
    with pytest.raises(UserError, match="b has no sample"):
        make_plan({"a": make_shard([9]), "b": make_shard([])}, data=data)


def test_the_schedule_runs_over_all_steps() -> None:
    changes: dict[str, Any] = {"schedule": Schedule().model_dump(by_alias=True), "budget": {"steps": 10}}
    schedule = make_schedule(make_plan({"a": make_shard([16] * 400)}, **changes), **changes)
    rates = [schedule.learning_rate(step) for step in range(10)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
