"""Stage digests: what counts, what does not."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from stagecoach_api.kinds.data import DataStage
from stagecoach_api.spec import TrainingRun
from stagecoach_core.digest import input_digests
from stagecoach_core.values import Found
from tests.core.makers import CODE, data_stage, digests_of, plan_of, pretrain_stage, run_of, sft_stage


def digest(stage: dict[str, Any], contents: dict[str, str] | None = None, code: str = CODE, **spec: Any) -> str:
    """Digest of a single stage that reads external inputs only."""
    plan = plan_of(run_of(stage, **spec), contents, code)
    return digests_of(plan)[stage["name"]]


SFT = sft_stage()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({**SFT, "name": "tuned"}, id="the stage's name"),
        pytest.param({**SFT, "resources": {"nodes": 4, "gpusPerNode": 8, "memory": "1Gi"}}, id="resources"),
        pytest.param({**SFT, "queue": {"name": "research"}}, id="the queue"),
        pytest.param({**SFT, "pods": {"nodeSelector": {"pool": "a"}, "priorityClass": "high"}}, id="the pods"),
        pytest.param({**SFT, "retries": {"user": 3}}, id="retries"),
        pytest.param({**SFT, "timeoutSeconds": 5}, id="the time-out"),
        pytest.param({**SFT, "image": "registry/trainer:1.0"}, id="an image by tag"),
        pytest.param(sft_stage(packing=True), id="a default that is written out"),
        pytest.param(sft_stage(optimizer={"learningRate": 0.001, "beta1": 0.9}), id="another way to write a number"),
    ],
)
def test_does_not_change_the_digest(other: dict[str, Any]) -> None:
    assert digest(other) == digest(SFT)


def test_the_runs_name_does_not_change_the_digest() -> None:
    assert digest(SFT, name="other") == digest(SFT)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(sft_stage(optimizer={"learningRate": 2e-3}), id="a learning rate"),
        pytest.param(sft_stage(template={"name": "vicuna"}), id="a template"),
        pytest.param(sft_stage(data=[{"uri": "a.json", "weight": 2.0}]), id="the weight of a set"),
        pytest.param(sft_stage(data=[{"uri": "a.json", "format": "alpaca"}]), id="the format of a set"),
        pytest.param(sft_stage(data=[{"uri": "a.json", "split": "heldout"}]), id="the split of a set"),
        pytest.param(sft_stage(data=[{"uri": "a.json", "maxSamples": 3}]), id="the number of samples"),
        pytest.param(sft_stage(data=[{"uri": "a.json", "fields": {"input": "x"}}]), id="field names"),
        pytest.param(sft_stage(data=[{"uri": "a.json", "name": "a"}]), id="a set's name, given explicitly"),
        pytest.param(sft_stage(data=[{"uri": "a.json"}, {"uri": "b.json"}]), id="another set"),
        pytest.param(sft_stage(optimizer={"learningRate": 1e-3, "clip": None}), id="a field that is None on purpose"),
        pytest.param({**SFT, "seed": 1}, id="the seed"),
        pytest.param({**SFT, "image": "registry/trainer@sha256:1"}, id="an image by digest"),
    ],
)
def test_changes_the_digest(other: dict[str, Any]) -> None:
    assert digest(other) != digest(SFT)


def test_code_counts_unless_the_image_is_given_by_digest() -> None:
    pinned = {**SFT, "image": "registry/trainer@sha256:1"}
    elsewhere = {**SFT, "image": "mirror/trainer@sha256:1"}
    assert digest(SFT, code="other") != digest(SFT)
    assert digest(pinned, code="other") == digest(pinned) == digest(elsewhere)


def test_content_counts_and_its_location_does_not() -> None:
    moved = sft_stage(data=[{"uri": "elsewhere/b.json"}])
    assert digest(moved, {"elsewhere/b.json": "1"}) == digest(SFT, {"a.json": "1"})
    assert digest(SFT, {"a.json": "2"}) != digest(SFT, {"a.json": "1"})


@pytest.mark.parametrize(
    ("stage", "uri"),
    [
        (
            {"name": "words", "tokenizer": {"base": {"uri": "llama"}, "add": {"charactersFrom": "characters.txt"}}},
            "characters.txt",
        ),
        (
            {"name": "score", "evaluate": {"model": {"uri": "llama"}, "lmEval": [{"uri": "task.yaml"}]}},
            "task.yaml",
        ),
    ],
    ids=["a file of characters", "a task of one's own"],
)
def test_the_content_of_a_file_named_in_a_plain_field_counts(stage: dict[str, Any], uri: str) -> None:
    assert digest(stage, {uri: "1"}) != digest(stage, {uri: "2"})


def phased(source: dict[str, Any], name: str) -> TrainingRun:
    phases = [{"name": "first", "tokens": 64, "weights": [{"name": name, "weight": 1.0}]}]
    return run_of(data_stage(source["stage"]), pretrain_stage(data=[source], phases=phases))


def pretrain_digest(run: TrainingRun) -> str:
    data_stages = [stage.config for stage in run.spec.stages if isinstance(stage.config, DataStage)]
    contents = {config.sources[0].uri or "": "same" for config in data_stages}
    return digests_of(plan_of(run, contents))["pretrain"]


def test_a_sets_name_derived_from_its_stage_does_not_count_even_if_a_phase_uses_it() -> None:
    before = phased({"stage": "corpus"}, "corpus")
    renamed = phased({"stage": "texts"}, "texts")
    named = phased({"stage": "texts", "name": "corpus"}, "corpus")
    assert pretrain_digest(renamed) == pretrain_digest(before)
    assert pretrain_digest(named) != pretrain_digest(before)


def test_a_digest_waits_for_every_stage_that_is_read() -> None:
    plan = plan_of(run_of(data_stage("a"), data_stage("b"), data_stage("c", "a", "b")))
    one = {"a": Found("1", "content a", "file:///a")}
    both = {**one, "b": Found("2", "content b", "file:///b")}
    assert input_digests(plan.stages["c"], one) is None
    assert input_digests(plan.stages["c"], both) == {"stage:a": "content a", "stage:b": "content b"}


def test_order_alone_does_not_change_the_digest() -> None:
    free = plan_of(run_of(data_stage("a"), data_stage("b")))
    bound = plan_of(run_of(data_stage("a"), data_stage("b", after=["a"])))
    assert digests_of(free)["b"] == digests_of(bound)["b"]


def test_the_digest_is_the_sha256_of_canonical_json_that_can_be_written_by_hand() -> None:
    stage = {"name": "words", "tokenizer": {"base": {"uri": "llama"}, "add": {"charactersFrom": "characters.txt"}}}
    config = {
        "base": {"digest": "content of llama"},
        "add": {"characters": "", "charactersFrom": {"digest": "content of characters.txt"}, "specialTokens": []},
        "measureOn": [],
    }
    identity = {"code": CODE, "config": config, "kind": "tokenizer", "seed": 7}
    written = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest(stage, seed=7) == hashlib.sha256(written.encode()).hexdigest()
