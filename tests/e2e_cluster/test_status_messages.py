"""A run's status reports problems promptly, with the message of the component that found them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from stagecoach_api import names
from tests.e2e_cluster.world import RELEASE, SECRET, SYSTEM, Run, World, corpus, training, training_run, vocabulary

pytestmark = pytest.mark.cluster

PROMPT_SECONDS = 10.0
"""Time limit for reporting problems of image, mount and quota."""


def one_stage(world: World, namespace: str, name: str, **stage: Any) -> dict[str, Any]:
    return training_run(world, namespace, name, [{**corpus(), **stage}])


def seconds_after_pods(run: Run, reported: Callable[[], bool]) -> float:
    """Return the seconds from the first pod's creation until something is reported."""
    run.wait("it has a pod", lambda: bool(run.pods()), 60)
    started = time.monotonic()
    run.wait("the problem is reported", reported, 60)
    return time.monotonic() - started


def test_an_image_that_cannot_be_pulled_is_reported(world: World, namespace: str) -> None:
    image = "registry.invalid/trainer@sha256:" + "1" * 64
    run = world.submit(one_stage(world, namespace, "image", image=image))
    assert seconds_after_pods(run, lambda: run.has("Progressing", "ImageUnavailable")) <= PROMPT_SECONDS
    message = run.condition("Progressing")["message"]
    assert image in message or "ImagePullBackOff" in message or "ErrImagePull" in message
    run.delete()


def test_a_missing_secret_is_reported(world: World, namespace: str) -> None:
    body = one_stage(world, namespace, "secret")
    body["spec"]["storage"]["credentials"]["secretName"] = "absent"
    run = world.submit(body)
    assert seconds_after_pods(run, lambda: run.has("Progressing", "SecretMissing")) <= PROMPT_SECONDS
    assert "absent" in run.condition("Progressing")["message"]
    run.delete()


def test_a_queue_that_does_not_exist_is_reported_with_kueues_message(world: World, namespace: str) -> None:
    run = world.submit(one_stage(world, namespace, "queue", queue={"name": "no-such-queue"}))
    run.wait("it waits", lambda: run.has("QuotaReserved", "WaitingForQuota"), PROMPT_SECONDS)
    run.wait(
        "Kueue's message is shown", lambda: "no-such-queue" in run.condition("QuotaReserved")["message"], PROMPT_SECONDS
    )
    assert run.pods() == []
    run.delete()


def test_a_users_error_is_not_retried_and_its_pod_is_reported(world: World, namespace: str) -> None:
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


def test_deletion_removes_all_objects_and_keeps_the_artifacts(world: World, namespace: str) -> None:
    stages = [corpus(), vocabulary(), training("train", 2000, every=50)]
    run = world.submit(training_run(world, namespace, "deleted", stages))
    run.runs_stage("train", 240)
    store, digest = run.store(), run.stage("corpus")["digest"]
    run.delete()
    assert run.owned() == []
    assert store.exists(f"artifacts/{digest}/manifest.json")


def test_no_s3_key_is_written_anywhere(world: World, namespace: str) -> None:
    access, secret = world.s3.keys
    run = world.submit(one_stage(world, namespace, "discreet"))
    run.wait("it has a pod", lambda: bool(run.pods()), 60)
    (pod,) = [pod["metadata"]["name"] for pod in run.pods()]
    run.complete(120)
    texts = [world.kubectl("logs", pod, f"-n{namespace}")]
    texts += [world.kubectl("get", kind, f"-n{namespace}", "--output=json") for kind in ("pods", "jobsets", "events")]
    texts += [world.kubectl("get", kind, f"-n{namespace}", "--output=json") for kind in ("configmaps", names.PLURAL)]
    texts.append(world.kubectl("logs", f"-n{SYSTEM}", f"deployment/{RELEASE}", "--all-pods=true"))
    assert [text for text in texts if access in text or secret in text] == []
    assert SECRET in texts[1]  # pods refer to the Secret by name only
