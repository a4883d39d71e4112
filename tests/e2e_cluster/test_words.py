"""What a run's status says while something is wrong: at once, in the words of whoever knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from stagecoach_api import names
from tests.e2e_cluster.world import RELEASE, SECRET, SYSTEM, Run, World, corpus, training, training_run, vocabulary

pytestmark = pytest.mark.cluster

PROMPT_SECONDS = 10.0
"""Image, mount and quota trouble is shown within that."""


def one_stage(world: World, namespace: str, name: str, **stage: Any) -> dict[str, Any]:
    return training_run(world, namespace, name, [{**corpus(), **stage}])


def since_pods(run: Run, told: Callable[[], bool]) -> float:
    """Return the seconds from the first pod's being there until something is told."""
    run.wait("it has a pod", lambda: bool(run.pods()), 60)
    started = time.monotonic()
    run.wait("the trouble is told", told, 60)
    return time.monotonic() - started


def test_an_image_that_cannot_be_had_is_named(world: World, namespace: str) -> None:
    image = "registry.invalid/trainer@sha256:" + "1" * 64
    run = world.submit(one_stage(world, namespace, "image", image=image))
    assert since_pods(run, lambda: run.has("Progressing", "ImageUnavailable")) <= PROMPT_SECONDS
    said = run.condition("Progressing")["message"]
    assert image in said or "ImagePullBackOff" in said or "ErrImagePull" in said
    run.delete()


def test_a_missing_secret_is_named(world: World, namespace: str) -> None:
    body = one_stage(world, namespace, "secret")
    body["spec"]["storage"]["credentials"]["secretName"] = "absent"
    run = world.submit(body)
    assert since_pods(run, lambda: run.has("Progressing", "SecretMissing")) <= PROMPT_SECONDS
    assert "absent" in run.condition("Progressing")["message"]
    run.delete()


def test_a_queue_that_does_not_exist_is_named_in_kueue_s_words(world: World, namespace: str) -> None:
    run = world.submit(one_stage(world, namespace, "queue", queue={"name": "no-such-queue"}))
    run.wait("it waits", lambda: run.has("QuotaReserved", "WaitingForQuota"), PROMPT_SECONDS)
    run.wait("Kueue is quoted", lambda: "no-such-queue" in run.condition("QuotaReserved")["message"], PROMPT_SECONDS)
    assert run.pods() == []
    run.delete()


def test_a_users_error_is_not_tried_again_and_names_its_place(world: World, namespace: str) -> None:
    stages = [corpus(), vocabulary(), training("train", 10, nodes=1)]
    stages[2]["pretrain"]["batch"] = {"tokens": 128, "microBatchRows": 1}
    stages[2]["pretrain"]["data"] = [{"name": "en", "uri": "data/instructions.train.json", "format": "sharegpt"}]
    run = world.submit(training_run(world, namespace, "mistake", stages))
    run.wait("it has failed", lambda: run.has("Failed"), 180)
    assert run.condition("Failed")["reason"] == "UserError"
    (attempt,) = run.stage("train")["attempts"]
    assert attempt["cause"] == "user"
    assert attempt["exitCode"] != 0
    assert all(attempt[field] for field in ("pod", "node", "message"))
    run.delete()


def test_deletion_leaves_nothing_in_the_cluster_and_the_artifacts_where_they_are(world: World, namespace: str) -> None:
    stages = [corpus(), vocabulary(), training("train", 2000, every=50)]
    run = world.submit(training_run(world, namespace, "deleted", stages))
    run.runs_stage("train", 240)
    store, digest = run.store(), run.stage("corpus")["digest"]
    run.delete()
    for kind in ("jobsets", "jobs", "pods", "services", "configmaps"):
        assert world.list(kind, namespace, {names.LABEL_RUN: "deleted"}) == [], kind
    assert store.exists(f"artifacts/{digest}/manifest.json")


def test_no_key_to_s3_is_written_anywhere(world: World, namespace: str) -> None:
    access, secret = world.s3.keys
    run = world.submit(one_stage(world, namespace, "discreet"))
    run.wait("it has a pod", lambda: bool(run.pods()), 60)
    (pod,) = [pod["metadata"]["name"] for pod in run.pods()]
    run.complete(120)
    told = [world.kubectl("logs", pod, f"-n{namespace}")]
    told += [world.kubectl("get", kind, f"-n{namespace}", "--output=json") for kind in ("pods", "jobsets", "events")]
    told += [world.kubectl("get", kind, f"-n{namespace}", "--output=json") for kind in ("configmaps", names.PLURAL)]
    told.append(world.kubectl("logs", f"-n{SYSTEM}", f"deployment/{RELEASE}", "--all-pods=true"))
    assert [text for text in told if access in text or secret in text] == []
    assert SECRET in told[1]  # the Secret is named, and only named
