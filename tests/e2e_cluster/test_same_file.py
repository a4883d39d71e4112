"""The laptop's example on the cluster with the README's commands: the same file, the same bytes, nothing run twice."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from stagecoach_api import names
from stagecoach_api.artifacts import Pointer
from stagecoach_api.reading.loading import load_run
from tests import ROOT
from tests.e2e_cluster.world import SYSTEM, Run, World, readme_commands

pytestmark = pytest.mark.cluster

EXAMPLE = "examples/chinese-alpaca-tiny.yaml"
NAME = "chinese-alpaca-tiny"
TWO_PODS = "pretrain"
SHORT = {
    "base.pretrain.budget.tokens": 40960,
    "embeddings.pretrain.budget.tokens": 20480,
    "pretrain.pretrain.budget.tokens": 40960,
    "pretrain.resources.nodes": 2,
    "pretrain.resources.cpu": "500m",
    "sft.sft.budget.steps": 20,
    "score.evaluate.gates[0].atLeast": 0,
}
"""Changes to the example: a tenth of its steps, and a gate that passes, since such a model answers badly; and one stage
on two pods, which are two ranks on a laptop, each with one thread, as before, and half a CPU, so that both fit on a
small node."""
SECONDS_FROM_CACHE = 10.0


def short_example(folder: Path, name: str = NAME) -> Path:
    """Write the shortened example under a name; return the file."""
    loaded = load_run(ROOT / EXAMPLE, [f"stages.{path}={value}" for path, value in SHORT.items()])
    body = loaded.run.model_dump(mode="json", by_alias=True, exclude_unset=True)
    body["metadata"] = {"name": name}
    file = folder / "examples" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(body, sort_keys=False))
    return file


def test_pods_train_the_example_to_the_bytes_of_a_local_run_and_only_once(world: World, tmp_path: Path) -> None:
    run = Run(world, SYSTEM, NAME)
    short_example(tmp_path)
    for command in readme_commands("kubectl apply"):
        world.run(command, cwd=tmp_path)
    with watched(world) as watching:
        run.complete(900)
        for command in readme_commands("kubectl wait"):
            assert "condition met" in world.run(command)
        watching.terminate()
        seen = watching.communicate()[0]
    assert [text for text in (NAME, "Progressing", "Complete", "pretrain") if text not in seen] == [], seen
    assert all(stage["attempt"] == 1 and not stage.get("cached") for stage in run.status()["stages"])
    assert run.manifest(TWO_PODS).environment["nodes"] == 2

    outputs = [world.run(command, cwd=tmp_path) for command in readme_commands("stagecoach")]
    assert "sft" in outputs[0]
    assert "model.safetensors" in [path.name for path in (tmp_path / "build" / "my-model").iterdir()]

    again = Run(world, SYSTEM, f"{NAME}-again")
    file = short_example(tmp_path, again.name)
    started = time.monotonic()
    world.kubectl("apply", f"-n{SYSTEM}", "-f", str(file))
    again.complete(60)
    assert time.monotonic() - started <= SECONDS_FROM_CACHE
    assert {stage["state"] for stage in again.status()["stages"]} == {"Cached"}
    assert again.contents() == run.contents()
    assert again.pods() == world.list("jobsets", SYSTEM, {names.LABEL_RUN: again.name}) == []

    assert local_contents(world, tmp_path) == run.contents()


@contextmanager
def watched(world: World) -> Iterator[subprocess.Popen[str]]:
    """Start the README's `kubectl get … --watch`, and end it afterwards."""
    (command,) = readme_commands("kubectl get")
    watching = subprocess.Popen(command, env=world.environment, stdout=subprocess.PIPE, text=True)
    try:
        yield watching
    finally:
        watching.kill()
        watching.wait()


def local_contents(world: World, folder: Path) -> dict[str, str]:
    """Run the same file locally; return each stage's content digest from the pointers in the local store."""
    (folder / "examples" / "data").symlink_to(ROOT / "examples" / "data")
    world.stagecoach("run", str(folder / "examples" / f"{NAME}.yaml"), cwd=folder)
    pointers = (folder / ".stagecoach" / "store" / "runs" / "default" / NAME).glob("*.json")
    return {path.stem: Pointer.model_validate_json(path.read_bytes()).content_digest for path in pointers}
