"""Tokens and time of a plan, as far as they can be said."""

from __future__ import annotations

from typing import Any

import pytest
from core_makers import data_stage, plan_for, pretrain_stage, sft_stage

from stagecoach_core.estimate import Past, StageEstimate, estimate, longest_path_seconds, num_parameters

SHAPE = {"hiddenSize": 16, "intermediateSize": 24, "numLayers": 2, "numHeads": 4, "numKeyValueHeads": 2}
WORDS = {"name": "words", "tokenizer": {"train": {"data": [{"uri": "a.txt"}], "vocabSize": 100}}}


def base_stage(**config: Any) -> dict[str, Any]:
    stage = pretrain_stage("base", **config)
    del stage["pretrain"]["model"]
    stage["pretrain"].update(architecture=SHAPE, tokenizer={"stage": "words"})
    return stage


@pytest.mark.parametrize(
    ("config", "tokens", "tokens_from"),
    [
        pytest.param({"budget": {"tokens": 1000}}, 1000, "budget", id="a budget of tokens is the answer"),
        pytest.param(
            {"budget": {"steps": 10}, "batch": {"tokens": 50}},
            480,
            "budget.steps × batch",
            id="batches hold whole rows",
        ),
        pytest.param(
            {"budget": {"steps": 10}, "batch": {"samples": 4}},
            640,
            "budget.steps × batch, at most",
            id="samples fill at most a row each",
        ),
        pytest.param({"budget": {"epochs": 2}}, None, "the data decides", id="epochs depend on the data"),
        pytest.param(
            {"phases": [{"name": "a", "tokens": 300}, {"name": "b", "tokens": 200}]}, 500, "phases", id="phases add up"
        ),
    ],
)
def test_tokens(config: dict[str, Any], tokens: int | None, tokens_from: str) -> None:
    told = estimate(plan_for(pretrain_stage(**config)))["pretrain"]
    assert (told.tokens, told.tokens_from) == (tokens, tokens_from)


def test_a_stage_that_does_not_train_takes_no_tokens_and_as_long_as_last_time() -> None:
    plan = plan_for(data_stage("corpus"))
    assert estimate(plan)["corpus"] == StageEstimate(0, "", None, "not known before it has run once")
    assert estimate(plan, {"corpus": Past(0, 12.5)})["corpus"].seconds == 12.5


def test_time_follows_the_speed_of_last_time() -> None:
    plan = plan_for(pretrain_stage(budget={"tokens": 3000}))
    told = estimate(plan, {"pretrain": Past(1000, 10.0)})["pretrain"]
    assert (told.seconds, told.seconds_from) == (30.0, "100 tokens/s last time")


def test_epochs_take_the_tokens_of_last_time() -> None:
    told = estimate(plan_for(sft_stage()), {"sft": Past(1000, 10.0)})["sft"]
    assert (told.tokens, told.tokens_from, told.seconds) == (1000, "last time", 10.0)


def test_the_size_of_a_model_is_what_transformers_counts() -> None:
    """Reference: sum of the shapes of LlamaForCausalLM's tensors for this configuration, written out."""
    query = output = 16 * 16
    key = value = 8 * 16
    block = query + output + key + value + 3 * 16 * 24 + 16 + 16
    plan = plan_for(WORDS, base_stage())
    assert num_parameters(plan, "base", {}) == 2 * block + 2 * 100 * 16 + 16


def test_the_size_is_followed_through_stages_and_known_for_a_model_from_outside() -> None:
    plan = plan_for(WORDS, base_stage(), sft_stage(model={"stage": "base"}), sft_stage("other"))
    assert num_parameters(plan, "sft", {}) == num_parameters(plan, "base", {})
    assert num_parameters(plan, "other", {}) is None
    assert num_parameters(plan, "other", {"uri:base": 7_000_000_000}) == 7_000_000_000
    assert num_parameters(plan, "words", {}) is None


def test_time_from_a_flop_rate() -> None:
    stage = sft_stage(budget={"tokens": 1000})
    stage["resources"] = {"nodes": 2, "gpusPerNode": 4}
    full = estimate(plan_for(stage), flops_per_rank=1e6, parameters={"uri:base": 10**6})["sft"]
    assert full.seconds == pytest.approx(6e9 / 8e6)
    stage["sft"].update(trainable={"lora": {}}, gradientCheckpointing=True)
    frozen = estimate(plan_for(stage), flops_per_rank=1e6, parameters={"uri:base": 10**6})["sft"]
    assert frozen.seconds == pytest.approx((4 + 2) * 1e9 / 8e6)


def test_the_longest_chain_counts_and_what_is_done_does_not() -> None:
    plan = plan_for(data_stage("a"), data_stage("b"), data_stage("c", "a", "b"))
    estimates = {name: StageEstimate(seconds=seconds) for name, seconds in {"a": 5.0, "b": 3.0, "c": 2.0}.items()}
    assert longest_path_seconds(plan, estimates, done=()) == 7.0
    assert longest_path_seconds(plan, estimates, done=("a",)) == 5.0
    assert longest_path_seconds(plan, {**estimates, "b": StageEstimate()}, done=()) is None
    assert longest_path_seconds(plan, {**estimates, "b": StageEstimate()}, done=("b",)) == 7.0
