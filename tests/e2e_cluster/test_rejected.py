"""Invalid resources: the API server rejects those that are invalid in themselves, even without an operator; the
operator reports problems that only it can find in the status, all at once. Nothing else happens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from stagecoach_api import names
from tests.e2e_cluster.world import SYSTEM, World, corpus, training, training_run, vocabulary

pytestmark = pytest.mark.cluster

Spec = dict[str, Any]
Change = Callable[[Spec], object]


def sound(world: World, namespace: str, name: str) -> dict[str, Any]:
    """Return a valid run."""
    return training_run(world, namespace, name, [corpus(), vocabulary(), training("train", 10)])


def put(path: str, value: object) -> Change:
    """Return a change that sets the field at a dotted path below `spec`; numbers are indices of a list."""

    def change(spec: Spec) -> None:
        *parents, last = path.split(".")
        found: Any = spec
        for part in parents:
            found = found[int(part)] if part.isdigit() else found.setdefault(part, {})
        found[int(last) if last.isdigit() else last] = value

    return change


def drop(path: str) -> Change:
    """Return a change that removes the field at a dotted path below `spec`."""

    def change(spec: Spec) -> None:
        *parents, last = path.split(".")
        found: Any = spec
        for part in parents:
            found = found[int(part)] if part.isdigit() else found[part]
        del found[last]

    return change


REJECTED_BY_API_SERVER: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a stage of no kind": (drop("stages.0.data"), ("spec.stages[0]", "give exactly one of `data`")),
    "a stage of two kinds": (
        put("stages.0.tokenizer", {"train": {"data": [{"stage": "corpus"}], "vocabSize": 1024}}),
        ("spec.stages[0]", "or remove the rest"),
    ),
    "a kind that does not exist": (put("stages.0.pretrian", {}), ('unknown field "spec.stages[0].pretrian"',)),
    "a field that does not exist": (put("stages.2.pretrain.sequenceLenght", 1), ("sequenceLenght", "unknown field")),
    "no stages": (put("stages", []), ("spec.stages", "at least 1 items")),
    "two stages of one name": (put("stages.1.name", "corpus"), ("spec.stages[1]", "Duplicate value")),
    "a stage without a name": (drop("stages.1.name"), ("spec.stages[1].name", "Required value")),
    "an invalid name": (put("stages.1.name", "Übung 1"), ("spec.stages[1].name", "should match")),
    "a number written as text": (
        put("stages.2.pretrain.sequenceLength", "many"),
        ("sequenceLength", "must be of type integer"),
    ),
    "a learning rate below zero": (
        put("stages.2.pretrain.optimizer.learningRate", -1.0),
        ("optimizer.learningRate", "should be greater than"),
    ),
    "no learning rate": (drop("stages.2.pretrain.optimizer.learningRate"), ("learningRate", "Required value")),
    "two budgets": (put("stages.2.pretrain.budget.tokens", 10), ("budget", "give exactly one of `tokens`")),
    "no budget": (put("stages.2.pretrain.budget", {}), ("pretrain.budget", "give exactly one of `tokens`")),
    "a batch in tokens and in samples": (
        put("stages.2.pretrain.batch.samples", 8),
        ("pretrain.batch", "give exactly one of `tokens`, `samples`"),
    ),
    "an input without a source": (
        put("stages.2.pretrain.data.0", {"name": "en"}),
        ("data[0]", "exactly one of `stage`, `uri`"),
    ),
    "an input with two sources": (
        put("stages.2.pretrain.data.0.uri", "s3://models/x"),
        ("data[0]", "exactly one of `stage`, `uri`"),
    ),
    "heads that do not divide the model": (
        put("stages.2.pretrain.architecture.numHeads", 5),
        ("architecture", "`hiddenSize` must be divisible by `numHeads`"),
    ),
    "an architecture without vocabulary": (
        drop("stages.2.pretrain.tokenizer"),
        ("`architecture` needs a `tokenizer`", "give one"),
    ),
    "a model and an architecture": (
        put("stages.2.pretrain.model", {"stage": "corpus"}),
        ("pretrain", "give exactly one of `model`, `architecture`"),
    ),
    "offload without sharding": (
        put("stages.2.pretrain.sharding", {"offloadOptimizer": "cpu"}),
        ("sharding", "`offloadOptimizer: cpu` needs `zero` of 1 or more"),
    ),
    "a value that is not in the enumeration": (
        put("stages.2.pretrain.precision", "fp8"),
        ("precision", 'supported values: "bf16", "fp16", "fp32"'),
    ),
    "a tokenizer stage without anything to do": (
        put("stages.1.tokenizer", {}),
        ("tokenizer", "give at least one of `train`, `merge` and"),
    ),
    "topology required and preferred": (
        put("stages.2.queue", {"name": "q", "requiredTopology": "rack", "preferredTopology": "block"}),
        ("queue", "exclude each other: give at most one"),
    ),
    "a negative number of nodes": (
        put("stages.2.resources.nodes", -2),
        ("resources.nodes", "greater than or equal to 1"),
    ),
    "an empty spec": (lambda spec: spec.clear(), ("spec.stages", "Required value")),
}


@pytest.mark.parametrize("what", REJECTED_BY_API_SERVER)
def test_the_api_server_rejects(what: str, world: World, namespace: str) -> None:
    change, texts = REJECTED_BY_API_SERVER[what]
    body = sound(world, namespace, "broken")
    change(body["spec"])
    done = world.tries("kubectl", "create", "--filename", "-", given=body)
    assert done.returncode != 0, done.stdout
    assert [text for text in texts if text not in done.stderr] == [], done.stderr
    assert world.list(names.PLURAL, namespace) == []


def elsewhere(endpoint: str) -> Change:
    """Use another S3 server, without the Secret that the operator's own is accessed with: it is for that alone."""

    def change(spec: Spec) -> None:
        put("storage.endpoint", endpoint)(spec)
        drop("storage.credentials")(spec)

    return change


REJECTED_BY_OPERATOR: dict[str, tuple[Change, str, tuple[str, ...]]] = {
    "a cycle": (
        put("stages.0.after", ["train"]),
        "InvalidSpec",
        ("stages.corpus.after[0]", "in a cycle: corpus -> vocabulary -> train -> corpus"),
    ),
    "a stage that does not exist": (
        put("stages.2.pretrain.tokenizer", {"stage": "vocabluary"}),
        "InvalidSpec",
        ("stages.train.pretrain.tokenizer.stage", "vocabluary", "vocabulary"),
    ),
    "several mistakes at once": (
        lambda spec: [
            put("stages.0.after", ["absent"])(spec),
            put("stages.2.pretrain.tokenizer", {"stage": "no"})(spec),
        ],
        "InvalidSpec",
        ("stages.corpus.after", "absent", "stages.train.pretrain.tokenizer.stage", "2 problems"),
    ),
    "a bucket that does not exist": (
        put("storage.uri", "s3://no-such-bucket/x"),
        "StorageUnreachable",
        ("spec.storage.uri", "no-such-bucket"),
    ),
    "a server that does not answer": (
        elsewhere("http://127.0.0.1:9"),
        "StorageUnreachable",
        ("127.0.0.1:9",),
    ),
    "a server that the operator may not ask": (
        elsewhere("http://127.0.0.1:10"),
        "StorageNotAllowed",
        ("127.0.0.1:10", "storage.allowed"),
    ),
    "an input that is not there": (
        put("stages.0.data.sources.0.uri", "data/gone.jsonl.gz"),
        "InputNotFound",
        ("stages.corpus.data.sources[0].uri", "data/gone.jsonl.gz"),
    ),
    "a folder of the user's laptop": (
        put("stages.0.data.sources.0.uri", "/home/me/data.jsonl"),
        "InvalidSpec",
        ("stages.corpus.data.sources[0].uri", "pods cannot access a folder of your machine"),
    ),
    "an image without a digest": (
        put("stages.2.image", "registry.example.com/trainer:latest"),
        "InvalidSpec",
        ("stages.train.image", "name@sha256:"),
    ),
    "an image that is not allowed": (
        put("stages.2.image", "elsewhere.example.com/trainer@sha256:" + "2" * 64),
        "ImageNotAllowed",
        ("stages.train.image", "elsewhere.example.com", "must be an allowed image"),
    ),
}


@pytest.mark.parametrize("what", REJECTED_BY_OPERATOR)
def test_the_operator_reports_problems_that_only_it_can_find(what: str, world: World, namespace: str) -> None:
    change, reason, texts = REJECTED_BY_OPERATOR[what]
    body = sound(world, namespace, "unsound")
    change(body["spec"])
    run = world.submit(body)
    try:
        run.wait(
            "it is rejected",
            lambda: run.condition("Accepted")["status"] == "False" or rejection(run)["status"] == "False",
            60,
        )
        found = rejection(run)
        assert found["reason"] == reason, found
        assert [text for text in texts if text not in found["message"]] == [], found["message"]
        for kind in ("jobsets", "pods", "configmaps"):
            assert world.list(kind, namespace, {names.LABEL_RUN: "unsound"}) == [], kind
    finally:
        run.delete()


def rejection(run: Any) -> dict[str, Any]:
    """Return the condition with the reason of the rejection: Accepted if that is false, else Planned."""
    accepted: dict[str, Any] = run.condition("Accepted")
    planned: dict[str, Any] = run.condition("Planned")
    return accepted if accepted["status"] == "False" else planned


def test_the_api_server_rejects_invalid_runs_without_an_operator(world: World, namespace: str) -> None:
    world.kubectl("scale", "deployment/stagecoach", f"-n{SYSTEM}", "--replicas=0")
    try:
        body = copy.deepcopy(sound(world, namespace, "broken"))
        put("stages.2.pretrain.budget", {})(body["spec"])
        done = world.tries("kubectl", "create", "--filename", "-", given=json.loads(json.dumps(body)))
        assert done.returncode != 0
        assert "give exactly one of `tokens`" in done.stderr
    finally:
        world.kubectl("scale", "deployment/stagecoach", f"-n{SYSTEM}", "--replicas=2")
        world.kubectl("rollout", "status", "deployment/stagecoach", f"-n{SYSTEM}", "--timeout=120s")
