"""Estimates of tokens, time and memory: from the last run, else from closed forms of the model's shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stagecoach_api.artifacts import Manifest
from stagecoach_api.spec import TrainingRun
from stagecoach_api.store import Unreachable
from stagecoach_api.training import Training
from stagecoach_cli.estimate.cost import (
    START_SECONDS,
    Estimate,
    estimate,
    gpu_memory,
    total,
    trained_parameters,
    training_flops,
)
from stagecoach_cli.estimate.model_files import ModelFiles
from stagecoach_cli.estimate.model_size import model_shape
from stagecoach_core.plan import external_uris, make_plan
from stagecoach_core.values import External, Plan
from stagecoach_local.machine import Machine
from tests.cli.makers import NAME, data_stage, export_stage, pretrain_stage, tokenizer_stage

EMBEDDING = 300 * 32
LAYER = 4 * 32 * 32 + 3 * 32 * 64
TWO_CORES = Machine(cores=2)
LIBRARY = ModelFiles()

LLAMA_7B = {"hiddenSize": 4096, "intermediateSize": 11008, "numLayers": 32, "numHeads": 32}
A100S = {"nodes": 2, "gpusPerNode": 8, "gpuProduct": "NVIDIA-A100-SXM4-80GB"}
BODY_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
HEAD_7B = 32_000 * 4096


def plan_of(resources: dict[str, Any] | None = None, pieces: int = 300, **pretrain: Any) -> Plan:
    base = pretrain_stage("base", "words", "one")
    base["pretrain"] |= pretrain
    base["pretrain"] = {key: value for key, value in base["pretrain"].items() if value is not None}
    base["resources"] = resources or {}
    words = tokenizer_stage("words", "one")
    words["tokenizer"]["train"]["vocabSize"] = pieces
    stages = [data_stage("one"), words, base, export_stage("release", "base")]
    run = TrainingRun.model_validate({"metadata": {"name": NAME}, "spec": {"stages": stages}})
    return make_plan(run, {key: External(uri, "0") for key, uri in external_uris(run).items()}, code="test")


def seven_billion(**pretrain: Any) -> Plan:
    settings = {"architecture": LLAMA_7B, "sequenceLength": 2048, "batch": {"tokens": 1 << 20}}
    return plan_of(A100S, 32_000, **{**settings, "budget": {"tokens": 10**10}, **pretrain})


def training_of(plan: Plan) -> Training:
    config = plan.stages["base"].stage.config
    assert isinstance(config, Training)
    return config


def manifest(tokens: int, seconds: float, gpu_seconds: float = 0.0) -> Manifest:
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
        gpu_seconds=gpu_seconds,
        created=0.0,
    )


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_7b_model_on_16_a100_takes_what_palm_s_appendix_says() -> None:
    """A plan of this run once promised 27 hours on a laptop's core."""
    found = estimate(seven_billion(), "base", None, TWO_CORES, LIBRARY)
    per_token = 6 * (BODY_7B + HEAD_7B) + 12 * 32 * 4096 * 2048
    assert str(found.hardware) == "16 × A100"
    assert found.seconds == pytest.approx(START_SECONDS + 10**10 * per_token / (16 * 0.4 * 312e12))
    assert found.seconds is not None
    assert found.seconds / 3600 == pytest.approx(59.6, rel=0.01)
    assert found.gpu_hours == pytest.approx(16 * found.seconds / 3600)


def test_lora_is_counted_as_lora() -> None:
    lora = {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}}
    plan, full = seven_billion(trainable=lora), seven_billion()
    shape, adapters = model_shape(plan, "base", LIBRARY), 32 * 2 * 8 * 2 * 4096
    assert trained_parameters(shape, training_of(plan)) == adapters == 4_194_304  # arXiv 2106.09685: 4.2 million
    attention = 12 * 32 * 4096 * 2048
    assert training_flops(shape, training_of(plan)) == 4 * (BODY_7B + HEAD_7B) + 6 * adapters + attention
    assert training_flops(shape, training_of(full)) == 6 * (BODY_7B + HEAD_7B) + attention


def test_gradient_checkpointing_makes_the_forward_pass_twice() -> None:
    shape, plain = model_shape(seven_billion(), "base", LIBRARY), training_of(seven_billion())
    again = training_of(seven_billion(gradientCheckpointing=True))
    forward = 2 * (BODY_7B + HEAD_7B) + 4 * 32 * 4096 * 2048
    assert training_flops(shape, again) - training_flops(shape, plain) == forward


def test_without_gpus_time_is_that_of_this_machine_s_cores() -> None:
    found = estimate(plan_of(), "base", None, TWO_CORES, LIBRARY)
    per_token = 6 * (2 * LAYER + EMBEDDING) + 12 * 2 * 32 * 16
    assert (found.tokens, str(found.hardware), found.gpu_hours, found.memory) == (6400, "2 cores", 0.0, None)
    assert found.seconds == pytest.approx(START_SECONDS + 6400 * per_token / 8e10)


def test_time_scales_with_tokens_from_the_last_run_except_for_the_start() -> None:
    found = estimate(plan_of(), "base", manifest(3200, 50.0), TWO_CORES, LIBRARY)
    assert (found.tokens, found.seconds) == (6400, 80.0)
    assert estimate(plan_of(), "one", manifest(0, 5.0), TWO_CORES, LIBRARY).seconds == 5.0


def test_a_run_on_cores_gives_no_time_on_gpus() -> None:
    on_cores = estimate(seven_billion(), "base", manifest(10**10, 50.0), TWO_CORES, LIBRARY)
    assert on_cores == estimate(seven_billion(), "base", None, TWO_CORES, LIBRARY)
    assert estimate(seven_billion(), "base", manifest(10**10, 50.0, 800.0), TWO_CORES, LIBRARY).seconds == 50.0


def test_phases_and_steps_are_budgets_too() -> None:
    phases = [{"name": "a", "tokens": 100}, {"name": "b", "tokens": 20}]
    assert estimate(plan_of(phases=phases, budget=None), "base", None, TWO_CORES, LIBRARY).tokens == 120
    assert estimate(plan_of(budget={"steps": 10}), "base", None, TWO_CORES, LIBRARY).tokens == 640


def test_it_is_stated_why_a_time_is_unknown() -> None:
    epochs = estimate(plan_of(budget={"epochs": 2}), "base", None, TWO_CORES, LIBRARY)
    assert (epochs.tokens, epochs.seconds) == (None, None)
    assert epochs.unknown == "its tokens depend on the data; set `budget.tokens`, or run it once"
    assert "known after a first run" in estimate(plan_of(), "one", None, TWO_CORES, LIBRARY).unknown
    away = ModelFiles(unreachable={"s3://m/llama-7b": Unreachable("x", "it cannot be reached")})
    remote = estimate(plan_of(architecture=None, model={"uri": "s3://m/llama-7b"}), "base", None, TWO_CORES, away)
    assert remote.unknown == "the size of its model is unknown: s3://m/llama-7b: it cannot be reached"


def test_a_total_shows_whether_it_is_complete() -> None:
    one = estimate(seven_billion(), "base", None, TWO_CORES, LIBRARY)
    other = replace(one, tokens=None, seconds=3.0)
    whole = total([one, other])
    assert one.seconds is not None
    assert (whole.tokens, whole.seconds, whole.complete) == (10**10, one.seconds + 3.0, True)
    assert whole.gpu_hours == pytest.approx(16 * whole.seconds / 3600)
    assert not total([one, Estimate(one.hardware)]).complete


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "bytes_per_parameter"), [(0, 2 + 4 + 12), (1, 2 + 4 + 12 / 16), (2, 2 + 16 / 16), (3, 18 / 16)]
)
def test_weights_gradients_and_states_are_divided_as_by_zero(zero: int, bytes_per_parameter: float) -> None:
    """arXiv 1910.02054, figure 1, with gradients summed in fp32."""
    plan = seven_billion(sharding={"zero": zero})
    found = gpu_memory(model_shape(plan, "base", LIBRARY), training_of(plan), 16)
    assert found.total - found.activations == pytest.approx((BODY_7B + 2 * HEAD_7B) * bytes_per_parameter)


def test_activations_are_34_bytes_a_unit_or_2_with_checkpointing() -> None:
    """arXiv 2205.05198: s b h 34 for each layer; the input of each layer, and one layer, if they are recomputed."""
    shape = model_shape(seven_billion(), "base", LIBRARY)
    units = 2048 * 4 * 4096
    rows = {"batch": {"tokens": 1 << 20, "microBatchRows": 4}}
    assert gpu_memory(shape, training_of(seven_billion(**rows)), 16).activations == units * 34 * 32
    again = training_of(seven_billion(**rows, gradientCheckpointing=True))
    assert gpu_memory(shape, again, 16).activations == units * (2 * 32 + 34)


def test_what_does_not_fit_is_seen() -> None:
    assert not estimate(seven_billion(), "base", None, TWO_CORES, LIBRARY).fits
    settings = {"sharding": {"zero": 3}, "gradientCheckpointing": True}
    assert estimate(seven_billion(**settings), "base", None, TWO_CORES, LIBRARY).fits
    assert estimate(plan_of(), "base", None, TWO_CORES, LIBRARY).fits
