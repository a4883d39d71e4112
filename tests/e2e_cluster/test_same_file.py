"""The laptop's example on the cluster: the same file, the same bytes, and nothing done twice."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from cluster_world import ROOT, Run, World

from stagecoach_api import names
from stagecoach_cli.workspace import Workspace

pytestmark = pytest.mark.cluster

EXAMPLE = ROOT / "examples" / "chinese-alpaca-tiny.yaml"
NAME = "chinese-alpaca-tiny"
TWO_PODS = "pretrain"
SHORT = {
    "base.pretrain.budget.tokens": 40960,
    "embeddings.pretrain.budget.tokens": 20480,
    "pretrain.pretrain.budget.tokens": 40960,
    "sft.sft.budget.steps": 20,
    "score.evaluate.gates[0].atLeast": 0,
}
"""The example in a tenth of its steps: too few to answer well, so the gate is opened."""
SECONDS_FROM_CACHE = 10.0


def settings() -> list[str]:
    """Return the options that both worlds are given: fewer steps, and one stage on two pods, which here are ranks."""
    fields = SHORT | {f"{TWO_PODS}.resources.nodes": 2}
    return [word for path, value in fields.items() for word in ("--set", f"stages.{path}={value}")]


def submitted(world: World, namespace: str, name: str) -> Run:
    """Apply the example under a name, with storage in S3, as a user does who adds three lines to it."""
    run = _with_storage(world, namespace, name)
    world.apply(run)
    return Run(world, namespace, name)


def _with_storage(world: World, namespace: str, name: str) -> dict[str, object]:
    from cluster_world import training_run

    from stagecoach_api.loading import load_run

    overrides = [word for word in settings() if word != "--set"]
    loaded = load_run(EXAMPLE, overrides).run.model_dump(mode="json", by_alias=True, exclude_unset=True)
    body = training_run(world, namespace, name, loaded["spec"]["stages"], defaults=loaded["spec"]["defaults"])
    body["spec"]["storage"]["uri"] = world.s3.uri(f"e2e/{namespace}")  # one for all names, so that they share artifacts
    return body


def test_the_example_is_trained_on_pods_to_the_bytes_of_a_local_run_and_never_again(
    world: World, namespace: str, tmp_path: Path
) -> None:
    run = submitted(world, namespace, NAME)
    run.complete(900)
    assert len({pod["spec"].get("hostname") for pod in run.pods(TWO_PODS)}) <= 2
    assert run.stage(TWO_PODS)["attempts"][-1]["contentDigest"] == run.contents()[TWO_PODS]
    assert run.manifest(TWO_PODS).environment["nodes"] == 2
    assert all(stage["attempt"] == 1 and not stage.get("cached") for stage in run.status()["stages"])

    again = submitted(world, namespace, f"{NAME}-again")
    started = time.monotonic()
    again.complete(60)
    assert time.monotonic() - started <= SECONDS_FROM_CACHE
    assert [stage["state"] for stage in again.status()["stages"]] == ["Cached"] * len(again.status()["stages"])
    assert again.contents() == run.contents()
    assert again.pods() == []
    assert world.list("jobsets", namespace, {names.LABEL_RUN: again.name}) == []

    done = world.tries(sys.executable, "-m", "stagecoach_cli", "run", str(EXAMPLE), *settings(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert local_contents(tmp_path) == run.contents()


def local_contents(folder: Path) -> dict[str, str]:
    """Return the content digest of every stage of the run in a folder, by the pointers in its store."""
    pointers = (Workspace(folder / ".stagecoach").default_storage / "runs" / "default" / NAME).glob("*.json")
    return {path.stem: json.loads(path.read_text())["content_digest"] for path in pointers}
