"""InstructGPT's three steps in Kueue: tuning, a reward model on two pods, PPO on two pods, and a comparison. A pod of
PPO is killed in the middle, and the bytes equal those of an undisturbed run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e_cluster.faults import kill_pod, rank0s_watched, works
from tests.e2e_cluster.queues import queue_with_quota
from tests.e2e_cluster.world import Run, World, corpus, training, training_run, vocabulary

pytestmark = pytest.mark.cluster

QUEUE = "alignment"
UPDATES, EVERY = 200, 10
WORDS = ("light", "water", "glass", "colour", "ray", "paper", "sun", "prism")


def asks(word: str) -> str:
    return f"Say {word} once."


def once(word: str) -> str:
    return f"{word}."


def thrice(word: str) -> str:
    return f"{word} {word} {word}."


@pytest.fixture(scope="module", autouse=True)
def queue(world: World, namespace: str) -> Iterator[None]:
    """Quota for two pods: one stage at a time."""
    with queue_with_quota(world, namespace, QUEUE, {"cpu": "1"}):
        yield


@pytest.fixture(scope="module")
def inputs(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions with answers, and the same questions with a better and a worse answer."""
    folder = tmp_path_factory.mktemp("alignment")
    draw = random.Random(1)
    words = [draw.choice(WORDS) for _ in range(160)]
    asked = [{"instruction": asks(word), "output": draw.choice((once(word), thrice(word)))} for word in words]
    judged = [{"prompt": asks(word), "chosen": once(word), "rejected": thrice(word)} for word in words]
    for name, records in {"asked": asked, "judged": judged}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    world.s3.upload(folder, "inputs/alignment")
    return "alignment"


def stages(inputs: str) -> list[dict[str, Any]]:
    """Return the pipeline, small enough for a minute on one core."""
    shared = {
        "sequenceLength": 64,
        "optimizer": {"learningRate": 1.0e-3},
        "precision": "fp32",
        "maxDroppedShare": 0.5,
    }
    asked = {"uri": f"{inputs}/asked.jsonl", "format": "alpaca"}
    judge = {"name": "judge", "model": {"stage": "judge"}}
    return [
        corpus(),
        vocabulary(),
        training("base", 20, nodes=1),
        {
            "name": "tuned",
            "sft": {
                **shared,
                "model": {"stage": "base"},
                "data": [asked],
                "template": {"name": "humanBot"},
                "batch": {"samples": 16, "microBatchRows": 4},
                "budget": {"steps": 40},
            },
        },
        {
            "name": "judge",
            "resources": {"nodes": 2},
            "rewardModel": {
                **shared,
                "model": {"stage": "tuned"},
                "data": [{"uri": f"{inputs}/judged.jsonl", "format": "pairs"}],
                "batch": {"samples": 16, "microBatchRows": 8},
                "budget": {"steps": 20},
            },
        },
        {
            "name": "aligned",
            "resources": {"nodes": 2},
            "ppo": {
                **shared,
                "model": {"stage": "tuned"},
                "data": [asked],
                "rewards": [judge],
                "rollout": {"maxNewTokens": 12},
                "batch": {"samples": 16, "microBatchRows": 8},
                "budget": {"steps": UPDATES},
                "optimizer": {"learningRate": 1.0e-4},
                "guards": {"minEndedShare": None, "maxLengthFactor": None},
                "checkpoints": {"everySteps": EVERY},
            },
        },
        {
            "name": "compared",
            "evaluate": {
                "model": {"stage": "aligned"},
                "precision": "fp32",
                "rewards": [
                    {
                        "name": "worth",
                        "data": {"name": "asked", **asked},
                        "maxSamples": 16,
                        "generation": {"maxNewTokens": 12},
                        "rewards": [judge],
                        "rivals": [{"name": "tuned", "model": {"stage": "tuned"}}],
                    }
                ],
            },
        },
    ]


def queued(world: World, namespace: str, name: str, inputs: str) -> dict[str, Any]:
    defaults = {"resources": {"cpu": "500m"}, "queue": {"name": QUEUE}}
    return training_run(world, namespace, name, stages(inputs), defaults=defaults)


@pytest.fixture(scope="module")
def calm(world: World, namespace: str, inputs: str) -> Run:
    """The same stages, undisturbed, with a separate storage."""
    run = world.submit(queued(world, namespace, "calm", inputs))
    run.complete(600)
    return run


def test_killing_a_pod_of_ppo_does_not_change_the_result(world: World, namespace: str, inputs: str, calm: Run) -> None:
    with rank0s_watched(world, namespace, "aligned") as rank0s:
        run = world.submit(queued(world, namespace, "stormy", inputs))
        run.wait("PPO has saved an update", lambda: run.saved_step("aligned") >= EVERY, 420)
        kill_pod(run, "aligned", 1)
        run.wait("a second attempt is running", lambda: works(run, "aligned", 2), 180)
        run.complete(420)
    assert run.contents() == calm.contents()
    assert (rank0s.together, rank0s.overlaps()) == ([], [])
    assert [attempt["number"] for attempt in run.stage("aligned")["attempts"]] == [1, 2]


def test_the_comparison_reports_the_win_rate_of_ppo(calm: Run) -> None:
    metrics = calm.manifest("compared").metrics
    assert 0.0 <= metrics["worth.winRate.tuned"] <= 1.0
    assert {"worth.reward", "worth.reward.tuned"} <= set(metrics)


def test_the_policy_can_be_fetched_and_opened(world: World, calm: Run, tmp_path: Path) -> None:
    world.stagecoach("artifacts", "get", calm.stage("aligned")["artifact"]["uri"], str(tmp_path / "policy"))
    files = {path.name for path in (tmp_path / "policy").rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json"} <= files
