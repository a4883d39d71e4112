"""Estimates of tokens and time: from the last run, else from the model's size."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api.artifacts import Manifest
from stagecoach_api.spec import TrainingRun
from stagecoach_cli.estimate import START_SECONDS, Estimate, estimate, num_parameters, total
from stagecoach_core.plan import external_uris, make_plan
from stagecoach_core.values import External, Plan
from tests.cli.makers import NAME, data_stage, export_stage, pretrain_stage, tokenizer_stage

EMBEDDINGS = 2 * 300 * 32
LAYER = 4 * 32 * 32 + 3 * 32 * 64


def plan_of(**pretrain: Any) -> Plan:
    base = pretrain_stage("base", "words", "one")
    base["pretrain"] |= pretrain
    base["pretrain"] = {key: value for key, value in base["pretrain"].items() if value is not None}
    stages = [data_stage("one"), tokenizer_stage("words", "one"), base, export_stage("release", "base")]
    run = TrainingRun.model_validate({"metadata": {"name": NAME}, "spec": {"stages": stages}})
    return make_plan(run, {key: External(uri, "0") for key, uri in external_uris(run).items()}, code="test")


def manifest(tokens: int, seconds: float) -> Manifest:
    return Manifest(
        stage_digest="a",
        content_digest="b",
        kind="pretrain",
        objects=(),
        config={},
        code="test",
        seed=0,
        tokens=tokens,
        seconds=seconds,
        created=0.0,
    )


def test_parameters_are_counted_from_the_architecture_also_for_later_stages() -> None:
    plan = plan_of()
    assert num_parameters(plan, "base") == EMBEDDINGS + 2 * LAYER
    assert num_parameters(plan, "release") == num_parameters(plan, "base")
    assert num_parameters(plan, "one") is None


@pytest.mark.parametrize(
    ("uri", "parameters"), [("s3://m/llama-7b", 7e9), ("qwen2.5-0.5B/", 0.5e9), ("pythia-160m", 160e6), ("model", None)]
)
def test_the_size_of_an_external_model_is_read_from_its_name(uri: str, parameters: float | None) -> None:
    assert num_parameters(plan_of(architecture=None, model={"uri": uri}), "base") == parameters


def test_time_scales_with_tokens_from_the_last_run_except_for_the_start() -> None:
    assert estimate(plan_of(), "base", manifest(3200, 50.0), cores=2) == Estimate(tokens=6400, seconds=80.0)
    assert estimate(plan_of(), "one", manifest(0, 5.0), cores=2) == Estimate(tokens=None, seconds=5.0)


def test_without_a_last_run_time_is_estimated_from_the_size_of_the_model() -> None:
    found = estimate(plan_of(), "base", None, cores=2)
    assert found.tokens == 6400
    assert found.seconds == pytest.approx(START_SECONDS + 6 * 6400 * (EMBEDDINGS + 2 * LAYER) / 8e10)
    assert estimate(plan_of(), "one", None, cores=2) == Estimate()


def test_phases_and_steps_are_budgets_too() -> None:
    phases = [{"name": "a", "tokens": 100}, {"name": "b", "tokens": 20}]
    assert estimate(plan_of(phases=phases, budget=None), "base", None, cores=2).tokens == 120
    assert estimate(plan_of(budget={"steps": 10}), "base", None, cores=2).tokens == 640
    assert estimate(plan_of(budget={"epochs": 2}), "base", None, cores=2).tokens is None


def test_a_total_shows_whether_it_is_complete() -> None:
    whole = total([Estimate(10, 2.0), Estimate(None, 3.0)])
    assert (whole.tokens, whole.seconds, whole.complete) == (10, 5.0, True)
    assert not total([Estimate(10, 2.0), Estimate()]).complete
